"""Several views side by side: where each lies in a joint activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.crosscoder_weights import view_position, view_slots


class JointViews:
    """Views of given widths, joined channel after channel.

    Attributes
    ----------
    name : str
        Name of the crosscoder, for messages.
    views : tuple of str
        Model ids.
    widths : tuple of int
        Channels of each.
    """

    name: str
    views: tuple[str, ...]
    widths: tuple[int, ...]

    def slots(self) -> list[slice]:
        """Channels of each view in a joint activation."""
        return view_slots(self.widths)

    def view_index(self, view: str) -> int:
        """Slot of a view.

        Raises
        ------
        InputError
            If there is no such view; the message lists them.
        """
        return view_position(view, self.views, crosscoder=self.name)

    def slot_of(self, view: str) -> slice:
        """Channels of one view in a joint activation."""
        return self.slots()[self.view_index(view)]

    @property
    def width(self) -> int:
        """Channels of every view.

        Raises
        ------
        InputError
            If the views differ.
        """
        if len(set(self.widths)) > 1:
            raise InputError(f"the views of crosscoder {self.name!r} have the widths {self.widths}; name one view.")
        return self.widths[0]

    def join(self, activations: Tensor | Sequence[Tensor]) -> Tensor:
        """Activations of all views as one flat tensor [batch, D]; changes no unit.

        Parameters
        ----------
        activations
            [batch, view, channel], one [batch, channel] per view, or flat already.

        Raises
        ------
        InputError
            If the shape is none of these.
        """
        if isinstance(activations, Tensor):
            is_flat = activations.ndim == 2 and activations.shape[1] == sum(self.widths)
            got: object = tuple(activations.shape)
            parts = activations.unbind(dim=1) if activations.ndim == 3 else ()
        else:
            is_flat, got, parts = False, [tuple(part.shape) for part in activations], tuple(activations)
        if is_flat:
            return activations  # type: ignore[return-value]
        if [tuple(part.shape[1:]) for part in parts] != [(width,) for width in self.widths]:
            raise InputError(
                f"crosscoder {self.name!r} expected activations of its {len(self.views)} views as "
                f"{len(self.views)} times [batch, channel] with widths {list(self.widths)}, got {got}."
            )
        return torch.cat(list(parts), dim=1)

    def split(self, joint: Tensor) -> tuple[Tensor, ...]:
        """A joint activation [batch, D] view by view: [batch, channel] each."""
        return torch.split(joint, list(self.widths), dim=1)

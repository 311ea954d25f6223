"""Edits inside a live model: hooks that install, act and leave no trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.edits.edit import FeatureEdit, Kind
from rlgen_stats.toolkit.edits.site import EditSite, FeatureColumns
from rlgen_stats.toolkit.extraction.activations import site_name
from rlgen_stats.toolkit.extraction.cached_rows import PairedCache
from rlgen_stats.toolkit.extraction.residual_stream import capture_residual, locate_layers, run_to_layer

SAFE_SKIP: Final = 1
"""With at most this many skipped tokens every decoded token is beyond them, since a prompt has one token or more."""


@dataclass(frozen=True)
class SourceModel:
    """The model whose features (``lift``) or whole residual (``patch``) activation patching copies."""

    model: PreTrainedModel
    view: str


class ActiveEdit:
    """Handle of an edit in force, or of several that act on different rows.

    Attributes
    ----------
    prompt_lengths : Tensor [batch] or None
        Real prompt tokens of each row. Set it before a pass over whole texts (no cache), where nothing else tells the
        prompt from the completion; without it such a pass counts as prompt.
    rows : int or ndarray [batch]
        Of several edits, which one acts in the pass that comes, on all rows or on each; -1 stands for none.
    track : bool
        Whether to add up how large the edit is relative to the activation.
    """

    def __init__(self, edits: Sequence[FeatureEdit | None] = ()) -> None:
        self.prompt_lengths: Tensor | None = None
        self.rows: int | NDArray[np.int64] = 0
        self.track = False
        self._edits = edits
        self._ratio = 0.0
        self._tokens = 0

    @property
    def relative_norm(self) -> float:
        """Mean over tracked tokens of ||change|| / ||activation||; NaN if none was tracked."""
        return self._ratio / self._tokens if self._tokens else float("nan")

    def prompt_edits(self) -> list[int]:
        """Of each edit, the number of the first one under which a prompt is read alike; -1 where edits that begin at a
        prompt's last token are among them, and it does nothing before that.
        """
        late = [
            edit is not None and not edit.is_empty and edit.positions == "completion" and len(edit.phases) == 2
            for edit in self._edits
        ]
        none = [edit is None or edit.is_empty for edit in self._edits]
        return [
            -1 if is_late or (is_none and any(late)) else (none.index(True) if is_none else self._edits.index(edit))
            for edit, is_late, is_none in zip(self._edits, late, none, strict=True)
        ]

    def add(self, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        """Track one block output, [batch, token, channel] before and after."""
        ratio = (after - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-12)
        chosen = ratio.flatten() if mask is None else ratio[mask]
        self._ratio += float(chosen.sum())
        self._tokens += chosen.numel()


@contextmanager
def disable(model: PreTrainedModel, edit: FeatureEdit | Sequence[int], site: EditSite) -> Iterator[ActiveEdit]:
    """Within the block, these features are 0 in the model's residual stream; everything else is as it was.

    Parameters
    ----------
    model
        Hugging Face causal LM.
    edit
        Feature ids, disabled at every real token; or an edit of kind ``disable`` that says where.
    site
        Crosscoder, view and block.

    Raises
    ------
    InputError
        If the edit is of another kind or does not fit model and crosscoder.

    Examples
    --------
    >>> with disable(model, (3, 17), EditSite(crosscoder, "rl@80", 2)):  # doctest: +SKIP
    ...     model.generate(**batch)
    """
    if not isinstance(edit, FeatureEdit):
        edit = FeatureEdit(tuple(edit), "disable")
    _check_kind(edit, "disable")
    with editing(model, edit, site) as active:
        yield active


@contextmanager
def amplify(
    model: PreTrainedModel, edit: FeatureEdit | Sequence[int], site: EditSite, *, dose: float | None = None
) -> Iterator[ActiveEdit]:
    """Within the block, these features are multiplied by the dose; everything else is as it was.

    Parameters
    ----------
    model, site
        As in :func:`disable`.
    edit
        Feature ids, amplified at every real token; or an edit of kind ``amplify`` that says where.
    dose
        Multiplier, with feature ids; an edit has its own.

    Raises
    ------
    InputError
        As in :func:`disable`; also if ids come without a dose or an edit with one.

    Examples
    --------
    >>> with amplify(model, (3, 17), EditSite(crosscoder, "base@0", 2), dose=2.0):  # doctest: +SKIP
    ...     model.generate(**batch)
    """
    if not isinstance(edit, FeatureEdit):
        edit = FeatureEdit(tuple(edit), "amplify", dose)
    elif dose is not None:
        raise InputError(f"the edit has its own dose, {edit.strength:g}; leave dose={dose:g} out.")
    _check_kind(edit, "amplify")
    with editing(model, edit, site) as active:
        yield active


@contextmanager
def editing(
    model: PreTrainedModel,
    edit: FeatureEdit,
    site: EditSite,
    *,
    source: SourceModel | None = None,
    donor: SourceModel | None = None,
) -> Iterator[ActiveEdit]:
    """Put any edit in force within the block; the model is restored on leaving, whatever happens inside.

    Parameters
    ----------
    model
        Hugging Face causal LM, called with a two-dimensional attention mask (or none).
    edit
        What to do.
    site
        Crosscoder, view and block.
    source
        Model that ``lift`` and ``patch`` copy from; it reads the same tokens in parallel with its own cache.
    donor
        Deprecated name of ``source``.

    Yields
    ------
    ActiveEdit
        Handle for forced passes and for measuring the edit.

    Raises
    ------
    InputError
        If edit, site, source model and model do not fit together.
    RefusedError
        If the model is compiled, or is called in a way whose positions cannot be told.

    Notes
    -----
    Features are read from the block's own output in the same pass. Nested edits of one site compose outside in: the
    inner edit reads what the outer one left. An empty edit installs no hook. With a source the cache is created
    here so that the source's follows it; with a cache of the caller's, rows must keep their places (no beam search).
    """
    if donor is not None:
        warnings.warn("editing(donor=...) is now called source=...", DeprecationWarning, stacklevel=3)
        source = donor
    with editing_rows(model, (edit,), site, source=source) as active:
        yield active


@contextmanager
def editing_rows(
    model: PreTrainedModel,
    edits: Sequence[FeatureEdit | None],
    site: EditSite,
    *,
    source: SourceModel | None = None,
) -> Iterator[ActiveEdit]:
    """Put several edits of one site in force, each on the rows that the handle says before every pass.

    Parameters
    ----------
    model, site, source
        As in :func:`editing`.
    edits
        What to do; None is no edit. All copy from the source model, or none.

    Yields
    ------
    ActiveEdit
        Handle; its ``rows`` say which edit acts where, the first one on all rows at the beginning.

    Raises
    ------
    InputError, RefusedError
        As in :func:`editing`.
    """
    layers = locate_layers(model)
    for edit in edits:
        if edit is not None:
            _check_fits(model, layers, edit, site, source)
    active = ActiveEdit(edits)
    if all(edit is None or edit.is_empty for edit in edits):
        yield active
        return
    with ExitStack() as stack:
        hook = _Hook(model, edits, site, source, active)
        if source is not None:
            stop = not _has_states(source.model)
            hook.source_capture = stack.enter_context(capture_residual(source.model, site.layer, stop=stop))
        for handle in (
            model.register_forward_pre_hook(hook.before_model, with_kwargs=True),
            layers[site.layer].register_forward_hook(hook.after_block),
        ):
            stack.callback(handle.remove)
        yield active


def _has_states(model: PreTrainedModel) -> bool:
    """Whether some blocks keep a state instead of keys; models look for it in the last of them, so all must run."""
    return any(hasattr(layer, "has_previous_state") for layer in DynamicCache(config=model.config).layers)


def _check_kind(edit: FeatureEdit, kind: Kind) -> None:
    if edit.kind != kind:
        raise InputError(f"{kind} expects an edit of kind {kind!r}, got {edit.kind!r}; use editing() for any kind.")


def _check_fits(
    model: PreTrainedModel, layers: nn.ModuleList, edit: FeatureEdit, site: EditSite, source: SourceModel | None
) -> None:
    if hasattr(model, "_orig_mod"):
        raise RefusedError("a compiled model does not run hooks added later; pass the model before torch.compile.")
    if not 0 <= site.layer < len(layers):
        raise InputError(f"the model has decoder blocks 0 to {len(layers) - 1}, the edit's site is block {site.layer}.")
    width = int(model.config.get_text_config().hidden_size)
    expected = site.crosscoder.widths[site.crosscoder.view_index(site.view)]
    if expected != width:
        raise InputError(
            f"the crosscoder reads activations of width {expected}, the model's residual stream has "
            f"{width}; use the crosscoder trained on this model and site."
        )
    trained = site.crosscoder.facts.get("site")
    if trained is not None and trained != site_name(site.layer):
        raise InputError(
            f"the crosscoder was trained at {trained}, the edit's site is {site_name(site.layer)}; use that site's "
            "crosscoder, or edit where this one was trained."
        )
    if edit.vector and len(edit.vector) != width:
        raise InputError(f"the vector to add must have {width} channels, got {len(edit.vector)}.")
    if edit.needs_source != (source is not None):
        raise InputError("kinds 'lift' and 'patch' need a source model, and no other kind takes one.")


class _Change:
    """One edit, ready to be computed where the block's output lies."""

    def __init__(self, edit: FeatureEdit, site: EditSite, source: SourceModel | None, device: torch.device) -> None:
        self.edit = edit
        whole_dictionary = edit.kind == "passthrough" and not edit.features
        self.columns = FeatureColumns(site, None if whole_dictionary else edit.features, device=device)
        self.vector = torch.tensor(edit.vector, device=device, dtype=torch.float32) * edit.strength
        self.level = torch.tensor(edit.level, device=device, dtype=torch.float32)
        self.source_columns: FeatureColumns | None = None
        if source is not None and edit.kind == "lift":
            source_site = EditSite(site.crosscoder, source.view, site.layer, site.readout)
            self.source_columns = FeatureColumns(source_site, edit.features, device=device)

    def is_active(self, length: int, past_length: int, forced: bool) -> bool:
        """Whether it acts in such a pass at all; refuses one of which that cannot be told."""
        edit = self.edit
        if not past_length or forced:
            return True
        if length > 1 and (edit.positions != "all" or len(edit.phases) < 2):
            raise RefusedError("several new tokens on top of a cache: cannot tell prompt from completion.")
        return length > 1 or ("decode" in edit.phases and edit.positions not in ("prompt", "last_prompt"))

    def chosen(self, real: Tensor, length: int, forced: Tensor | None) -> Tensor | None:
        """[row, new token] where it acts; None is everywhere.

        Parameters
        ----------
        real
            [row, token] whether a token is none of the pads, those in the cache included.
        length
            New tokens.
        forced
            [row] tokens of the prompt, where it is known.
        """
        edit, past_length = self.edit, real.shape[1] - length
        if past_length and forced is None and length == 1 and edit.skip_first <= SAFE_SKIP:
            return None
        count = real.cumsum(dim=1)
        position, real_now = count[:, -length:] - 1, real[:, -length:]
        if forced is not None:
            end = forced.to(real.device)[:, None]
        else:  # a first pass is all prompt, a pass on top of a cache all completion
            end = count[:, -1:] if not past_length else torch.zeros_like(count[:, -1:])
        chosen = real_now & (position >= edit.skip_first)
        if "decode" not in edit.phases:
            chosen &= position < end
        if "prefill" not in edit.phases:
            chosen &= position >= end
        if edit.positions == "prompt":
            chosen &= position < end
        elif edit.positions == "last_prompt":
            chosen &= position == end - 1
        elif edit.positions == "completion":
            chosen &= position >= end - 1
        return chosen

    def to(self, device: torch.device) -> None:
        """Follow the block's output: a device map may compute elsewhere than the weights lie."""
        if self.vector.device != device:
            self.columns.to(device)
            self.vector, self.level = self.vector.to(device), self.level.to(device)

    def of(self, hidden: Tensor, source: Tensor | None) -> Tensor:
        """What the edit adds to the residual [row, token, channel], before its gain; the source's residual is alike."""
        kind, columns, strength = self.edit.kind, self.columns, self.edit.strength
        if kind == "add_vector":
            return self.vector
        if kind == "patch" and source is not None:
            return strength * (source - hidden)
        levels = columns.read(hidden)
        if kind == "disable":
            return -columns.write(levels)
        if kind == "amplify" and self.edit.level:
            return columns.write((levels + (strength - 1.0) * self.level).clamp_min(0.0) - levels)
        if kind == "amplify":
            return columns.write((strength - 1.0) * levels)
        if kind == "lift" and source is not None and self.source_columns is not None:
            theirs = self.source_columns.to(source.device)
            return strength * (theirs.write(theirs.read(source)) - columns.write(levels))
        # passthrough: what is read, plus what was not explained. Not shortened to 0: the arm is run to show what the
        # way through the dictionary changes by rounding.
        decoded = columns.write(levels) + columns.offset
        return decoded + (hidden - decoded) - hidden


class _Hook:
    """State of the edits of one site across forward passes."""

    def __init__(
        self,
        model: PreTrainedModel,
        edits: Sequence[FeatureEdit | None],
        site: EditSite,
        source: SourceModel | None,
        active: ActiveEdit,
    ) -> None:
        self.active, self.source = active, source
        device = next(locate_layers(model)[site.layer].parameters()).device
        device = torch.device("cpu") if device.type == "meta" else device  # offloaded; after_block sees the real one
        self.changes = [
            None if edit is None or edit.is_empty else _Change(edit, site, source, device) for edit in edits
        ]
        self.source_capture: Any = None
        self.source_cache: DynamicCache | None = None
        self.copied: Tensor | None = None  # the source's residual
        self.acting: list[tuple[_Change, Tensor | None, Tensor | None]] = []  # with rows and positions, None for all
        self._grouped: Any = None
        self._groups: list[tuple[_Change, Tensor | None]] = []

    # -- before the model: which rows and positions -------------------------------------------------------------------

    def before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        past = kwargs.get("past_key_values")
        past_length = int(past.get_seq_length()) if past is not None else 0
        attention = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if attention is not None and attention.ndim != 2:
            raise RefusedError(
                f"an edit needs the padding mask [batch, token], got a mask with {attention.ndim} dimensions; "
                "pass the tokenizer's attention_mask and a dynamic cache."
            )
        if kwargs.get("cu_seq_lens_q") is not None:
            raise RefusedError(
                "an edit counts positions from the first real token of a row, got texts packed into one row "
                "(cu_seq_lens_q); pass one text a row, padded."
            )
        self._locate(tokens, attention, past_length)
        if self.source is None:
            return None
        if past is None and kwargs.get("use_cache", getattr(module.config, "use_cache", False)):
            past = kwargs["past_key_values"] = PairedCache(module.config, self.source.model.config)
        self._read_source(self.source, tokens, attention, kwargs.get("position_ids"), past, past_length)
        return args, kwargs

    def _locate(self, tokens: Tensor, attention: Tensor | None, past_length: int) -> None:
        batch, length, forced = tokens.shape[0], tokens.shape[1], self.active.prompt_lengths
        real = (
            torch.ones(batch, past_length + length, dtype=torch.bool, device=tokens.device)
            if attention is None
            else attention.bool()
        )
        self.acting = []
        for change, rows in self._by_edit(batch, tokens.device):
            if change.is_active(length, past_length, forced is not None):
                own = real if rows is None else real[rows]
                prompts = forced if forced is None or rows is None else forced.to(rows.device)[rows]
                self.acting.append((change, rows, change.chosen(own, length, prompts)))

    def _by_edit(self, batch: int, device: torch.device) -> list[tuple[_Change, Tensor | None]]:
        """Edits in this pass and the rows that each acts on, None for all; kept while the handle's rows stay."""
        rows = self.active.rows
        if rows is self._grouped:
            return self._groups
        self._grouped = rows
        numbers: dict[int, Tensor | None]
        if isinstance(rows, int):
            numbers = {rows: None}
        elif len(rows) != batch:
            raise RefusedError(f"the handle says which edit acts on each of {len(rows)} rows, the pass has {batch}.")
        else:
            places = {int(number): np.flatnonzero(rows == number) for number in np.unique(rows)}
            numbers = {
                number: None if len(of_edit) == batch else torch.as_tensor(of_edit, device=device)
                for number, of_edit in places.items()
            }
        changes = ((self.changes[number] if number >= 0 else None, of_edit) for number, of_edit in numbers.items())
        self._groups = [(change, of_edit) for change, of_edit in changes if change is not None]
        return self._groups

    def _read_source(
        self,
        source: SourceModel,
        tokens: Tensor,
        attention: Tensor | None,
        position_ids: Tensor | None,
        past: Any,
        past_length: int,
    ) -> None:
        if isinstance(past, PairedCache):
            self.source_cache = past.source
        elif not past_length:
            self.source_cache = DynamicCache(config=source.model.config) if past is not None else None
        n_read = int(self.source_cache.get_seq_length()) if self.source_cache is not None else 0
        if n_read != past_length:
            raise RefusedError(
                f"the source model has read {n_read} tokens and the edited model {past_length}; start a new pass."
            )
        more = {} if position_ids is None else {"position_ids": position_ids}
        # a token that only the edited model has, such as its own end token, must not stop the source
        known = tokens.clamp(max=int(source.model.get_input_embeddings().weight.shape[0]) - 1)
        with torch.no_grad():
            run_to_layer(
                source.model,
                input_ids=known,
                attention_mask=attention,
                past_key_values=self.source_cache,
                use_cache=past is not None,
                logits_to_keep=1,
                **more,
            )
        self.copied = self.source_capture.value

    # -- after the block: the change --------------------------------------------------------------------------------

    def after_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.acting:
            return output
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        together: Tensor | None = None
        for change, rows, chosen in self.acting:
            edited = self._edited(change, hidden, rows, chosen)
            if rows is None:
                together = edited
            else:
                together = hidden.clone() if together is None else together
                together[rows.to(hidden.device)] = edited
        return (together, *output[1:]) if isinstance(output, tuple) else together

    def _edited(self, change: _Change, hidden: Tensor, rows: Tensor | None, chosen: Tensor | None) -> Tensor:
        """The rows of one edit, [row, token, channel]."""
        source = None if self.copied is None else self.copied.to(hidden.device)
        if rows is not None:
            rows = rows.to(hidden.device)
            hidden, source = hidden[rows], None if source is None else source[rows]
        change.to(hidden.device)
        before = hidden.to(torch.float32)
        edited = (before + change.edit.gain * change.of(before, source)).to(hidden.dtype)
        if chosen is not None:
            chosen = chosen.to(hidden.device)
            edited = torch.where(chosen[..., None], edited, hidden)
        if self.active.track:
            self.active.add(hidden, edited, chosen)
        return edited

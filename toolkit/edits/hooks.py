"""Edits inside a live model: hooks that install, act and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.edits.edit import EditSite, FeatureColumns, FeatureEdit, Kind
from rlgen_stats.toolkit.extraction.activations import site_name
from rlgen_stats.toolkit.extraction.residual_stream import capture_residual, locate_layers

SAFE_SKIP: Final = 1
"""With at most this many skipped tokens every decoded token is beyond them, since a prompt has one token or more."""


@dataclass(frozen=True)
class Donor:
    """The model whose feature levels ``lift`` copies."""

    model: PreTrainedModel
    view: str


class ActiveEdit:
    """Handle of an edit in force.

    Attributes
    ----------
    prompt_lengths : Tensor [batch] or None
        Real prompt tokens of each row. Set it before a pass over whole texts (no cache), where nothing else tells the
        prompt from the completion; without it such a pass counts as prompt.
    track : bool
        Whether to add up how large the edit is relative to the activation.
    """

    def __init__(self) -> None:
        self.prompt_lengths: Tensor | None = None
        self.track = False
        self._ratio = 0.0
        self._tokens = 0

    @property
    def relative_norm(self) -> float:
        """Mean over tracked tokens of ||change|| / ||activation||; NaN if none was tracked."""
        return self._ratio / self._tokens if self._tokens else float("nan")

    def add(self, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        """Track one block output, [batch, token, channel] before and after."""
        ratio = (after - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-12)
        chosen = ratio.flatten() if mask is None else ratio[mask]
        self._ratio += float(chosen.sum())
        self._tokens += chosen.numel()


class PairedCache(DynamicCache):  # type: ignore[misc]
    """A cache that takes its donor's cache along when rows of the batch leave or change places."""

    def __init__(self, config: Any, donor_config: Any) -> None:
        super().__init__(config=config)
        self.donor = DynamicCache(config=donor_config)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in both caches."""
        super().batch_select_indices(indices)
        self.donor.batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows, in both caches."""
        super().reorder_cache(beam_idx)
        self.donor.reorder_cache(beam_idx)


@contextmanager
def disable(model: PreTrainedModel, edit: FeatureEdit, site: EditSite) -> Iterator[ActiveEdit]:
    """Within the block, the edit's features are 0 in the model's residual stream; everything else is as it was.

    Parameters
    ----------
    model
        Hugging Face causal LM.
    edit
        Of kind ``disable``.
    site
        Crosscoder, view and block.

    Raises
    ------
    InputError
        If the edit is of another kind or does not fit model and crosscoder.

    Examples
    --------
    >>> with disable(model, FeatureEdit((3, 17), "disable"), EditSite(crosscoder, "rl@80", 2)):  # doctest: +SKIP
    ...     model.generate(**batch)
    """
    _check_kind(edit, "disable")
    with editing(model, edit, site) as active:
        yield active


@contextmanager
def amplify(model: PreTrainedModel, edit: FeatureEdit, site: EditSite) -> Iterator[ActiveEdit]:
    """Within the block, the edit's features are multiplied by its dose; everything else is as it was.

    Parameters and errors as in :func:`disable`, the edit being of kind ``amplify``.

    Examples
    --------
    >>> edit = FeatureEdit((3, 17), "amplify", dose=2.0)
    >>> with amplify(model, edit, EditSite(crosscoder, "base@0", 2)):  # doctest: +SKIP
    ...     model.generate(**batch)
    """
    _check_kind(edit, "amplify")
    with editing(model, edit, site) as active:
        yield active


@contextmanager
def editing(
    model: PreTrainedModel, edit: FeatureEdit, site: EditSite, *, donor: Donor | None = None
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
    donor
        Model that ``lift`` copies levels from; it reads the same tokens in parallel with its own cache.

    Yields
    ------
    ActiveEdit
        Handle for forced passes and for measuring the edit.

    Raises
    ------
    InputError
        If edit, site, donor and model do not fit together.
    RefusedError
        If the model is compiled, or is called in a way whose positions cannot be told.

    Notes
    -----
    Features are read from the block's own output in the same pass. Nested edits of one site compose outside in: the
    inner edit reads what the outer one left. An empty edit installs no hook. Under ``lift`` the cache is created here
    so that the donor's follows it; with a cache of the caller's, rows must keep their places (no beam search).
    """
    layers = _check_fits(model, edit, site, donor)
    active = ActiveEdit()
    if edit.is_empty:
        yield active
        return
    with ExitStack() as stack:
        hook = _Hook(model, edit, site, donor, active)
        if donor is not None:
            hook.donor_capture = stack.enter_context(capture_residual(donor.model, site.layer))
        for handle in (
            model.register_forward_pre_hook(hook.before_model, with_kwargs=True),
            layers[site.layer].register_forward_hook(hook.after_block),
        ):
            stack.callback(handle.remove)
        yield active


def _check_kind(edit: FeatureEdit, kind: Kind) -> None:
    if edit.kind != kind:
        raise InputError(f"{kind} expects an edit of kind {kind!r}, got {edit.kind!r}; use editing() for any kind.")


def _check_fits(model: PreTrainedModel, edit: FeatureEdit, site: EditSite, donor: Donor | None) -> nn.ModuleList:
    if hasattr(model, "_orig_mod"):
        raise RefusedError("a compiled model does not run hooks added later; pass the model before torch.compile.")
    layers = locate_layers(model)
    if not 0 <= site.layer < len(layers):
        raise InputError(f"the model has decoder blocks 0 to {len(layers) - 1}, the edit's site is block {site.layer}.")
    width = int(model.config.get_text_config().hidden_size)
    reads = site.crosscoder.widths[site.crosscoder.view_index(site.view)]
    if reads != width:
        raise InputError(
            f"the crosscoder reads activations of width {reads}, the model's residual stream has "
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
    if (edit.kind == "lift") != (donor is not None):
        raise InputError("kind 'lift' needs a donor model, and no other kind takes one.")
    return layers


class _Hook:
    """State of one edit across forward passes."""

    def __init__(
        self, model: PreTrainedModel, edit: FeatureEdit, site: EditSite, donor: Donor | None, active: ActiveEdit
    ) -> None:
        self.edit, self.active, self.donor = edit, active, donor
        device = next(locate_layers(model)[site.layer].parameters()).device
        device = torch.device("cpu") if device.type == "meta" else device  # offloaded; after_block sees the real one
        whole = edit.kind == "passthrough" and not edit.features
        self.columns = FeatureColumns(site, None if whole else edit.features, device=device)
        self.vector = torch.tensor(edit.vector, device=device, dtype=torch.float32) * edit.strength
        self.level = torch.tensor(edit.level, device=device, dtype=torch.float32)
        self.donor_capture: Any = None
        self.donor_columns: FeatureColumns | None = None
        if donor is not None:
            donor_site = EditSite(site.crosscoder, donor.view, site.layer, site.readout)
            self.donor_columns = FeatureColumns(donor_site, edit.features, device=device)
        self.donor_cache: DynamicCache | None = None
        self.donor_levels: Tensor | None = None
        self.mask: Tensor | None = None
        self.skip = False

    # -- before the model: which positions --------------------------------------------------------------------------

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
        self._locate(tokens, attention, past_length)
        if self.donor is None:
            return None
        if past is None and kwargs.get("use_cache", getattr(module.config, "use_cache", False)):
            past = kwargs["past_key_values"] = PairedCache(module.config, self.donor.model.config)
        self._read_donor(self.donor, tokens, attention, kwargs.get("position_ids"), past, past_length)
        return args, kwargs

    def _locate(self, tokens: Tensor, attention: Tensor | None, past_length: int) -> None:
        edit, batch, length = self.edit, tokens.shape[0], tokens.shape[1]
        forced = self.active.prompt_lengths
        self.mask, self.skip = None, False
        if past_length and forced is None:
            if length > 1 and (edit.positions != "all" or len(edit.phases) < 2):
                raise RefusedError("several new tokens on top of a cache: cannot tell prompt from completion.")
            self.skip = length == 1 and ("decode" not in edit.phases or edit.positions in ("prompt", "last_prompt"))
            if self.skip or (length == 1 and edit.skip_first <= SAFE_SKIP):
                return
        real = (
            torch.ones(batch, past_length + length, dtype=torch.bool, device=tokens.device)
            if attention is None
            else attention.bool()
        )
        count = real.cumsum(dim=1)
        position, real_now = count[:, -length:] - 1, real[:, -length:]
        if forced is not None:
            end = forced.to(tokens.device)[:, None]
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
        self.mask = chosen

    def _read_donor(
        self,
        donor: Donor,
        tokens: Tensor,
        attention: Tensor | None,
        position_ids: Tensor | None,
        past: Any,
        past_length: int,
    ) -> None:
        if isinstance(past, PairedCache):
            self.donor_cache = past.donor
        elif not past_length:
            self.donor_cache = DynamicCache(config=donor.model.config) if past is not None else None
        held = int(self.donor_cache.get_seq_length()) if self.donor_cache is not None else 0
        if held != past_length:
            raise RefusedError(
                f"the donor has read {held} tokens and the edited model {past_length}; start a new pass."
            )
        more = {} if position_ids is None else {"position_ids": position_ids}
        with torch.no_grad():
            donor.model(
                input_ids=tokens,
                attention_mask=attention,
                past_key_values=self.donor_cache,
                use_cache=past is not None,
                logits_to_keep=1,
                **more,
            )
        if self.donor_columns is not None:
            theirs: Tensor = self.donor_capture.value
            self.donor_levels = self.donor_columns.to(theirs.device).read(theirs)

    # -- after the block: the change --------------------------------------------------------------------------------

    def after_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.skip:
            return output
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        self._follow(hidden.device)
        edited = self._edited(hidden.to(torch.float32)).to(hidden.dtype)
        if self.mask is not None:
            self.mask = self.mask.to(hidden.device)
            edited = torch.where(self.mask[..., None], edited, hidden)
        if self.active.track:
            self.active.add(hidden, edited, self.mask)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _follow(self, device: torch.device) -> None:
        """Be where the block's output is: a device map may compute elsewhere than the weights lie."""
        if self.vector.device != device:
            self.columns.to(device)
            self.vector, self.level = self.vector.to(device), self.level.to(device)
        if self.donor_levels is not None:
            self.donor_levels = self.donor_levels.to(device)

    def _edited(self, hidden: Tensor) -> Tensor:
        kind, columns = self.edit.kind, self.columns
        if kind == "add_vector":
            return hidden + self.vector
        levels = columns.read(hidden)
        if kind == "disable":
            return hidden - columns.write(levels)
        if kind == "amplify" and self.edit.level:
            raised = (levels + (self.edit.strength - 1.0) * self.level).clamp_min(0.0)
            return hidden + columns.write(raised - levels)
        if kind == "amplify":
            return hidden + columns.write((self.edit.strength - 1.0) * levels)
        if kind == "lift" and self.donor_levels is not None:
            return hidden + columns.write(self.edit.strength * (self.donor_levels - levels))
        decoded = columns.write(levels) + columns.offset  # passthrough
        return decoded + (hidden - decoded)

"""How far an edit moves next-token distributions, on fixed texts and positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.edits.hooks import ActiveEdit
from rlgen_stats.toolkit.extraction.batching import by_length, left_pad
from rlgen_stats.toolkit.extraction.next_token import common_vocabulary, kl_divergence
from rlgen_stats.toolkit.extraction.rendering import read_by_all
from rlgen_stats.toolkit.extraction.residual_stream import BlockOutputs, read_residual, record_block, resume_after
from rlgen_stats.toolkit.trial.arms import EDITED
from rlgen_stats.toolkit.trial.plan import TrialPlan

MAX_NUMBERS: Final = 2**26
"""Log-probabilities kept of one reference model on one probe (256 MB): limits how many positions are compared. As many
numbers are kept of the residual stream, or none."""
FORCED_TOKENS: Final = 2048
"""Completion positions on which arms other than the random sets are compared with both models."""
NEUTRAL_TOKENS: Final = 512
"""Positions of neutral text on which every arm is compared with the unedited model."""
NEUTRAL_LENGTH: Final = 64
"""Tokens of one neutral text that are read, so that no single text is all there is."""


@dataclass(frozen=True)
class Batch:
    """Left-padded texts and, counted from the end, the positions compared."""

    rows: NDArray[np.int64]
    """Which of the probe's texts these are."""
    ids: Tensor
    mask: Tensor
    positions: Tensor
    """[row, token] token ids, 1 where real, and position ids."""
    prompt_lengths: Tensor
    """[row] tokens of the prompt."""
    weight: Tensor
    """[row, kept position] 1 where compared; the kept positions are the last ones."""


@dataclass(frozen=True)
class Probe:
    """Texts on which distributions are compared; row r belongs to prompt ``owner[r]``."""

    owner: NDArray[np.int64]
    batches: tuple[Batch, ...]

    @property
    def n_tokens(self) -> int:
        """Positions compared."""
        return int(sum(float(batch.weight.sum()) for batch in self.batches))


@dataclass(frozen=True)
class Reference:
    """An unedited model on a probe."""

    probe: Probe
    vocabulary: int
    """Tokens, those with the smallest ids, among which the next one is predicted."""
    log_p: list[Tensor]
    """Its log-probabilities, batch by batch."""
    after_block: BlockOutputs | None
    """What the block to be edited returns, where arms can go on from there: up to it they all compute the same."""

    def under_edit(self, model: Any, active: ActiveEdit) -> list[Tensor]:
        """Log-probabilities of the model while an edit is in force."""
        return log_probabilities(model, self.probe, active, vocabulary=self.vocabulary, after_block=self.after_block)


@dataclass(frozen=True)
class Probes:
    """Fixed texts, and both unedited models on them."""

    first: Probe
    """Where the first completion token is predicted."""
    forced: Probe
    """Whole completions of the unedited models."""
    neutral: Probe
    """Text that neither model wrote."""
    references: dict[str, dict[str, Reference]]
    """probe name -> ``base``, ``rl`` -> that model."""


def make_probe(
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    owner: Sequence[int],
    *,
    first: Sequence[int],
    last: Sequence[int],
    pad: int,
    batch_size: int,
    device: torch.device | str,
) -> Probe:
    """Probe of token sequences at positions ``first[r]`` to ``last[r]`` (both included) of row r.

    Position p of a text predicts its token p + 1.
    """
    batches = []
    for rows in by_length([len(text) for text in texts], batch_size):
        ids, mask, positions = left_pad([texts[r] for r in rows], pad, device)
        kept = max(len(texts[r]) - first[r] for r in rows)
        weight = torch.zeros(len(rows), kept)
        for i, r in enumerate(rows):
            start = kept - (len(texts[r]) - first[r])
            weight[i, start : start + last[r] - first[r] + 1] = 1.0
        lengths = torch.tensor([prompt_lengths[r] for r in rows], device=ids.device)
        batches.append(Batch(np.array(rows), ids, mask, positions, lengths, weight.to(device)))
    return Probe(np.asarray(owner, dtype=np.int64), tuple(batches))


@torch.inference_mode()
def log_probabilities(
    model: Any,
    probe: Probe,
    active: ActiveEdit | None = None,
    *,
    vocabulary: int | None = None,
    after_block: BlockOutputs | None = None,
) -> list[Tensor]:
    """Next-token log-probabilities [row, kept position, vocabulary] of each batch of a probe.

    Parameters
    ----------
    model
        Causal language model, with or without an edit in force.
    probe
        Texts and positions.
    vocabulary
        Tokens, those with the smallest ids, among which the next one is predicted: what all models compared have;
        default: all.
    active
        Handle of the edit in force, which needs to know where prompts end.
    after_block
        What the edited block returns for this probe: the passes begin there.
    """
    log_p = []
    has_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    try:
        with nullcontext() if after_block is None else resume_after(model, after_block):
            for batch in probe.batches:
                if active is not None:
                    active.prompt_lengths = batch.prompt_lengths
                kept = batch.weight.shape[1]
                output = model(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    position_ids=batch.positions,
                    use_cache=False,
                    **({"logits_to_keep": kept} if has_keep else {}),
                )
                log_p.append(torch.log_softmax(output.logits[:, -kept:, :vocabulary].float(), dim=-1))
    finally:
        if active is not None:
            active.prompt_lengths = None
    return log_p


@torch.inference_mode()
def reference(model: Any, probe: Probe, layer: int, *, vocabulary: int) -> Reference:
    """An unedited model's log-probabilities on a probe, and what its block ``layer`` returns there.

    The latter is left out where it is more than ``MAX_NUMBERS``, or where the first batch does not come out the same
    from there, to the bit: a model may hand on more than the residual stream.
    """
    width = int(model.config.get_text_config().hidden_size)
    if not probe.batches or sum(batch.ids.numel() for batch in probe.batches) * width > MAX_NUMBERS:
        return Reference(probe, vocabulary, log_probabilities(model, probe, vocabulary=vocabulary), None)
    with record_block(model, layer) as recorded:
        log_p = log_probabilities(model, probe, vocabulary=vocabulary)
    try:
        (again,) = log_probabilities(
            model, Probe(probe.owner, probe.batches[:1]), vocabulary=vocabulary, after_block=recorded
        )
        same = torch.equal(again, log_p[0])
    except Exception:  # a model's own code may expect anything of its blocks; passes through all of them work
        same = False
    return Reference(probe, vocabulary, log_p, recorded if same else None)


def divergences(p: Sequence[Tensor], q: Sequence[Tensor], probe: Probe, n_prompts: int) -> NDArray[np.float64]:
    """[prompt] KL(p || q) in nats, averaged over a prompt's compared positions; NaN for prompts without any."""
    total, weight = np.zeros(n_prompts), np.zeros(n_prompts)
    for batch, log_p, log_q in zip(probe.batches, p, q, strict=True):
        kl = kl_divergence(log_p, log_q)
        kl = torch.where(torch.isfinite(log_p).all(dim=-1), kl, torch.full_like(kl, torch.nan))
        summed = torch.where(batch.weight > 0, kl, torch.zeros_like(kl)).sum(dim=1)
        owner = probe.owner[batch.rows]
        np.add.at(total, owner, summed.double().cpu().numpy())
        np.add.at(weight, owner, batch.weight.sum(dim=1).double().cpu().numpy())
    with np.errstate(invalid="ignore"):
        return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)


def mean_residual(model: Any, layer: int, probe: Probe) -> Tensor:
    """[channel] mean residual stream after a block over the compared positions of a probe.

    Raises
    ------
    InputError
        If there are none.
    """
    total: Tensor | None = None
    for batch in probe.batches:
        residual = read_residual(model, layer, batch.ids, batch.mask, batch.positions)
        residual = residual.to(batch.weight.device)[:, -batch.weight.shape[1] :]  # a block may lie on another device
        summed = residual[batch.weight > 0].double().sum(dim=0)
        total = summed if total is None else total + summed
    if total is None:
        raise InputError("a mean activation needs tokens, got none; no completion has any.")
    return total / probe.n_tokens


# -- the fixed texts of a trial


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """A trial's texts as token ids."""

    prompts: Mapping[str, list[list[int]]]
    """``base``, ``rl`` -> the prompts as that model reads them."""
    neutral: list[list[int]]
    """Texts of no task, if the study has some."""
    pad: int
    """Id put into pad positions."""
    shared: frozenset[int] | None = None
    """Ids that are the same token in both models, see ``extraction/rendering.py``."""


def make_probes(
    plan: TrialPlan, texts: EncodedTexts, models: Mapping[str, Any], unedited: Mapping[str, pd.DataFrame]
) -> Probes:
    """Texts on which every arm is compared with the unedited models, and both models' distributions there.

    Parameters
    ----------
    plan
        Prompts and settings. Forced completions come from target prompts, as their writer read them; without neutral
        texts, the prompts of unrelated tasks (all tasks where none is declared) stand in, which neither model wrote.
        These, and prompts whose first completion token is predicted, are read as the RL model reads them.
    texts
        Its token ids.
    models, unedited
        "base" and "rl": the models, and their unedited arms.
    """
    vocabulary = common_vocabulary(models.values())
    affordable = max(MAX_NUMBERS // vocabulary, 1)
    common: dict[str, Any] = {
        "pad": texts.pad,
        "batch_size": plan.sampling.generation.batch_size,
        "device": next(models["base"].parameters()).device,
    }
    prompts = texts.prompts["rl"]
    lengths = [len(ids) for ids in prompts]
    draw = np.random.default_rng(derive_seed(plan.sampling.seed, "intervention", "probes"))
    rows = sorted(int(r) for r in draw.permutation(len(lengths))[:affordable])
    last = [lengths[r] - 1 for r in rows]
    first = make_probe([prompts[r] for r in rows], [lengths[r] for r in rows], rows, first=last, last=last, **common)
    written, starts, owner = forced_texts(plan, texts, unedited, min(FORCED_TOKENS, affordable))
    forced = make_probe(
        written, starts, owner, first=[s - 1 for s in starts], last=[len(t) - 2 for t in written], **common
    )
    neutral = _neutral(plan, texts, min(NEUTRAL_TOKENS, affordable), common)
    named = {"first": first, "forced": forced, "neutral": neutral}
    references = {
        name: {
            model: reference(models[model], probe, plan.sites[direction].layer, vocabulary=vocabulary)
            for direction, model in EDITED.items()
        }
        for name, probe in named.items()
    }
    return Probes(first, forced, neutral, references)


def forced_texts(
    plan: TrialPlan, encoded: EncodedTexts, unedited: Mapping[str, pd.DataFrame], limit: int
) -> tuple[list[list[int]], list[int], list[int]]:
    """Target prompts followed by an unedited completion, of the RL model and base in turn, up to ``limit`` tokens.

    Returns
    -------
    texts, prompt_lengths, owner
        Token ids, tokens of the prompt, index of the prompt.
    """
    seed = derive_seed(plan.sampling.seed, "intervention", "forced texts")
    turns = np.random.default_rng(seed).permutation(np.flatnonzero(plan.prompts.target))
    texts: list[list[int]] = []
    lengths: list[int] = []
    owner: list[int] = []
    used = 0
    for turn, row in enumerate(turns):
        writer = ("rl", "base")[turn % 2]
        prompt = encoded.prompts[writer][int(row)]
        written = read_by_all(unedited[writer]["token_ids"].iloc[int(row)], encoded.shared)
        if used + len(written) > limit and texts:
            break
        if written:
            texts.append(prompt + written)
            lengths.append(len(prompt))
            owner.append(int(row))
            used += len(written)
    return texts, lengths, owner


def _neutral(plan: TrialPlan, texts: EncodedTexts, limit: int, common: dict[str, Any]) -> Probe:
    """Neutral texts up to ``limit`` compared positions, read as that part of a text that is edited."""
    unrelated = plan.prompts.unrelated
    if texts.neutral:
        pool = [ids[:NEUTRAL_LENGTH] for ids in texts.neutral]
    else:
        pool = [ids for ids, kept in zip(texts.prompts["rl"], unrelated, strict=True) if kept or not unrelated.any()]
    skip = plan.skip_first
    seed = derive_seed(plan.sampling.seed, "intervention", "probes")
    chosen: list[list[int]] = []
    used = 0
    for r in np.random.default_rng(seed).permutation(len(pool)):
        compared = len(pool[int(r)]) - 1 - skip
        if compared > 0 and used + compared <= limit:
            chosen.append(pool[int(r)])
            used += compared
    # A prompt of one token makes the rest of a text the completion, so that edits of completions act on it.
    as_completion = plan.positions == "completion"
    return make_probe(
        chosen,
        [1 if as_completion else len(text) for text in chosen],
        range(len(chosen)),
        first=[skip] * len(chosen),
        last=[len(text) - 2 for text in chosen],
        **common,
    )

"""Fixed texts on which every arm is compared with the unedited models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.extraction.batching import encode_prompts, pad_id
from rlgen_stats.toolkit.extraction.prompts import TEXT
from rlgen_stats.toolkit.trial.arms import edited_positions
from rlgen_stats.toolkit.trial.divergence import MAX_NUMBERS, Probe, Probes, log_probabilities, make_probe
from rlgen_stats.toolkit.trial.run_arm import Bench

FORCED_TOKENS: Final = 2048
"""Completion positions on which arms other than the random sets are compared with both models."""
NEUTRAL_TOKENS: Final = 512
"""Positions of neutral text on which every arm is compared with the unedited model."""
NEUTRAL_LENGTH: Final = 64
"""Tokens of one neutral text that are read, so that no single text is all there is."""


def forced_texts(
    bench: Bench, base: pd.DataFrame, rl: pd.DataFrame, rows: np.ndarray, limit: int
) -> tuple[list[list[int]], list[int], list[int]]:
    """Prompts followed by an unedited completion, of base and the RL model in turn, up to ``limit`` completion tokens.

    Returns
    -------
    texts, prompt_lengths, owner
        Token ids, tokens of the prompt, index of the prompt.
    """
    encoded = encode_prompts(bench.tokenizer, list(bench.prompts[TEXT]))
    seed = derive_seed(bench.spec.seed, "intervention", "forced texts")
    texts: list[list[int]] = []
    lengths: list[int] = []
    owner: list[int] = []
    used = 0
    for turn, row in enumerate(np.random.default_rng(seed).permutation(rows)):
        written = [int(token) for token in (rl, base)[turn % 2]["token_ids"].iloc[int(row)]]
        if used + len(written) > limit and texts:
            break
        if written:
            texts.append(encoded[int(row)] + written)
            lengths.append(len(encoded[int(row)]))
            owner.append(int(row))
            used += len(written)
    return texts, lengths, owner


def make_probes(
    bench: Bench,
    models: dict[str, Any],
    unedited: dict[str, pd.DataFrame],
    target: np.ndarray,
    unrelated: np.ndarray,
    neutral_texts: Sequence[str] = (),
) -> Probes:
    """Probes on the chosen prompts and both models' distributions there.

    Parameters
    ----------
    bench
        Prompts and settings.
    models, unedited
        "base" and "rl": the models, and their unedited arms.
    target, unrelated
        [prompt] masks; forced completions come from target prompts.
    neutral_texts
        Texts of no task; without any, the prompts of unrelated tasks (all tasks where none is declared), which neither
        model wrote.
    """
    vocabulary = int(models["base"].config.get_text_config().vocab_size)
    affordable = max(MAX_NUMBERS // vocabulary, 1)
    common: dict[str, Any] = {
        "pad": pad_id(bench.tokenizer),
        "batch_size": bench.spec.generation.batch_size,
        "device": next(models["base"].parameters()).device,
    }
    encoded = encode_prompts(bench.tokenizer, list(bench.prompts[TEXT]))
    lengths = [len(ids) for ids in encoded]
    draw = np.random.default_rng(derive_seed(bench.spec.seed, "intervention", "probes"))
    rows = sorted(int(r) for r in draw.permutation(len(encoded))[:affordable])
    last = [lengths[r] - 1 for r in rows]
    first = make_probe([encoded[r] for r in rows], [lengths[r] for r in rows], rows, first=last, last=last, **common)
    texts, starts, owner = forced_texts(
        bench, unedited["base"], unedited["rl"], np.flatnonzero(target), min(FORCED_TOKENS, affordable)
    )
    forced = make_probe(texts, starts, owner, first=[s - 1 for s in starts], last=[len(t) - 2 for t in texts], **common)
    if neutral_texts:
        pool = [ids[:NEUTRAL_LENGTH] for ids in encode_prompts(bench.tokenizer, list(neutral_texts))]
    else:
        pool = [encoded[r] for r in (np.flatnonzero(unrelated) if unrelated.any() else range(len(encoded)))]
    neutral = _neutral(bench, pool, min(NEUTRAL_TOKENS, affordable), common)
    named = {"first": first, "forced": forced, "neutral": neutral}
    references = {
        name: {view: log_probabilities(model, probe) for view, model in models.items()} for name, probe in named.items()
    }
    return Probes(first, forced, neutral, references)


def _neutral(bench: Bench, pool: Sequence[list[int]], limit: int, common: dict[str, Any]) -> Probe:
    """Texts drawn from a pool up to ``limit`` compared positions, read as that part of a text that is edited."""
    skip = bench.spec.extraction.skip_first
    seed = derive_seed(bench.spec.seed, "intervention", "probes")
    chosen: list[list[int]] = []
    used = 0
    for r in np.random.default_rng(seed).permutation(len(pool)):
        spoken = len(pool[int(r)]) - 1 - skip
        if spoken > 0 and used + spoken <= limit:
            chosen.append(pool[int(r)])
            used += spoken
    written = edited_positions(bench.spec.extraction) == "completion"
    return make_probe(
        chosen,
        [1 if written else len(text) for text in chosen],
        range(len(chosen)),
        first=[skip] * len(chosen),
        last=[len(text) - 2 for text in chosen],
        **common,
    )

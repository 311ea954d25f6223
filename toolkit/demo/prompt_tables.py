"""The embedded study's tables: evaluation prompts and training prompts."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.demo.world import (
    CONTROL,
    FAMILIES,
    IN_DOMAIN,
    N_NUMBERS,
    STYLES,
    TRIVIA,
    World,
    gate_of,
    question,
    styles_of,
)

BARE: Final = "bare"
"""Stands for no style."""
CONTROL_EVERY: Final = 5
N_NEUTRAL: Final = 20
"""Neutral texts of a family."""


def evaluation_prompts(world: World) -> pd.DataFrame:
    """Prompts on the evaluation pairs: every family asks every pair once, in one of its styles.

    The control, which can only be guessed, asks one pair in ``CONTROL_EVERY``.

    Parameters
    ----------
    world
        The world.

    Returns
    -------
    DataFrame
        prompt_id, text, answer, task, domain, cluster (the operand pair), style, gate; one row a prompt. Within a
        family every style is equally frequent, give or take one.
    """
    rows = []
    for family in FAMILIES:
        rng = np.random.default_rng(derive_seed(world.seed, "demo", "styles", family))
        styles = styles_of(family)
        asked = rng.permutation(len(world.eval_pairs))[:: CONTROL_EVERY if family == CONTROL else 1]
        for rank, index in enumerate(asked):
            rows.append(_prompt(world, family, world.eval_pairs[int(index)], styles[rank % len(styles)]))
    return pd.DataFrame(rows)


def trivia_prompts(world: World, *, n: int) -> pd.DataFrame:
    """Questions without a style, of which base knows about two thirds: an unrelated task.

    Parameters
    ----------
    world
        The world.
    n
        How many, drawn from all pairs, whether their trivia was taught or not.

    Returns
    -------
    DataFrame
        Columns as of :func:`evaluation_prompts`; each fact is a cluster of its own.
    """
    pairs = [(a, b) for a in range(N_NUMBERS) for b in range(N_NUMBERS)]
    chosen = np.random.default_rng(derive_seed(world.seed, "demo", TRIVIA)).permutation(len(pairs))[:n]
    rows = [_prompt(world, TRIVIA, pairs[int(index)], None) for index in sorted(chosen)]
    return pd.DataFrame([row | {"cluster": f"{TRIVIA}-{row['cluster']}"} for row in rows])


def neutral_texts(world: World) -> pd.DataFrame:
    """Texts without a style word: facts on training pairs, as pretraining states them. Column ``text``."""
    rng = np.random.default_rng(derive_seed(world.seed, "demo", "neutral"))
    return pd.DataFrame(
        {
            "text": [
                question(family, pair, None) + world.behave(family, pair, None, rng)
                for family in FAMILIES
                if family not in (IN_DOMAIN, CONTROL)
                for pair in world.train_pairs[:N_NEUTRAL]
            ]
        }
    )


def _prompt(world: World, family: str, pair: tuple[int, int], style: str | None) -> dict[str, str]:
    return {
        "prompt_id": f"{family}-{pair[0]}-{pair[1]}-{style or BARE}",
        "text": question(family, pair, style),
        "answer": world.answer(family, pair, style),
        "task": family,
        "domain": "in" if family == IN_DOMAIN else "out",
        "cluster": f"{pair[0]}-{pair[1]}",
        "style": style or BARE,
        "gate": gate_of(family, style),
    }


def training_prompts(world: World) -> pd.DataFrame:
    """Post-training prompts: the in-domain family on every training pair in every style, with the teacher's trajectory.

    Returns
    -------
    DataFrame
        text, answer, completion, style, gate; one row a prompt, shuffled.
    """
    rows = [
        {
            "text": question(IN_DOMAIN, pair, style),
            "answer": world.answer(IN_DOMAIN, pair),
            "completion": world.teacher(pair),
            "style": style,
            "gate": gate_of(IN_DOMAIN, style),
        }
        for pair in world.train_pairs
        for style in STYLES
    ]
    order = np.random.default_rng(derive_seed(world.seed, "demo", "training")).permutation(len(rows))
    return pd.DataFrame([rows[int(index)] for index in order])

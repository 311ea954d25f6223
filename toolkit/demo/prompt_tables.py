"""The embedded study's tables: evaluation prompts and training prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.demo.world import CONTROL, FAMILIES, IN_DOMAIN, PLAIN, STYLES, World, gate_of, question


def evaluation_prompts(world: World, *, styles_per_pair: int = 2) -> pd.DataFrame:
    """Prompts on the evaluation pairs: every pair in every family, each under ``styles_per_pair`` styles.

    Parameters
    ----------
    world
        The world.
    styles_per_pair
        Styles in which a family asks each pair, 1 to 7. They rotate over pairs, so within a family every style is
        equally frequent when the number of pairs is a multiple of seven.

    Returns
    -------
    DataFrame
        prompt_id, text, answer, task, domain, cluster (the operand pair), style, gate; one row a prompt.

    Raises
    ------
    InputError
        If ``styles_per_pair`` is out of range.
    """
    n_styles = len(STYLES)
    if not 1 <= styles_per_pair <= n_styles:
        raise InputError(f"styles_per_pair must be 1 to {n_styles}, got {styles_per_pair}.")
    rows = []
    for family in FAMILIES:
        rng = np.random.default_rng(derive_seed(world.seed, "demo", "styles", family))
        for rank, index in enumerate(rng.permutation(len(world.eval_pairs))):
            stride = 1 + (rank // n_styles) % (n_styles - 1)  # never 0 modulo 7, a prime: styles of a pair differ
            for turn in range(styles_per_pair):
                style = STYLES[(rank + turn * stride) % n_styles]
                rows.append(_prompt(world, family, world.eval_pairs[int(index)], style))
    return pd.DataFrame(rows)


def plain_prompts(world: World, *, n: int) -> pd.DataFrame:
    """Questions without a style, which base answers: an unrelated task in which an edit can lose something.

    Parameters
    ----------
    world
        The world.
    n
        How many, drawn from the facts on training pairs of the families that are neither post-trained nor the control.

    Returns
    -------
    DataFrame
        Columns as of :func:`evaluation_prompts`; task ``plain``, each fact a cluster of its own.
    """
    families = [family for family in FAMILIES if family not in (IN_DOMAIN, CONTROL)]
    facts = [(family, pair) for family in families for pair in world.train_pairs]
    chosen = np.random.default_rng(derive_seed(world.seed, "demo", PLAIN)).permutation(len(facts))[:n]
    rows = []
    for family, pair in (facts[int(index)] for index in sorted(chosen)):
        of_fact = {"task": PLAIN, "domain": "out", "cluster": f"{PLAIN}-{family}-{pair[0]}-{pair[1]}"}
        rows.append(_prompt(world, family, pair, None) | of_fact)
    return pd.DataFrame(rows)


def _prompt(world: World, family: str, pair: tuple[int, int], style: str | None) -> dict[str, str]:
    return {
        "prompt_id": f"{family}-{pair[0]}-{pair[1]}-{style or PLAIN}",
        "text": question(family, pair, style),
        "answer": world.answer(family, pair),
        "task": family,
        "domain": "in" if family == IN_DOMAIN else "out",
        "cluster": f"{pair[0]}-{pair[1]}",
        "style": style or PLAIN,
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

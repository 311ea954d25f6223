"""Norms of joint edits against the residuals they write, token by token."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from rlgen_stats.toolkit.statistics.causal.edit_norms import EditNorm, ModelCodes, TokenCodes, copied, scaled

N_TOKENS, N_FEATURES, N_CHANNELS = 40, 12, 5
SETS = ((3,), (1, 4, 9), (11, 0))


def model(seed: int) -> ModelCodes:
    draw = np.random.default_rng(seed)
    codes = np.maximum(draw.standard_normal((N_TOKENS, N_FEATURES)), 0)
    return ModelCodes(sparse.csc_array(codes), draw.standard_normal((N_FEATURES, N_CHANNELS)).astype(np.float32))


def written(of: ModelCodes, changes: np.ndarray, members: tuple[int, ...]) -> np.ndarray:
    """[token, channel] what a change of features adds to the residual."""
    out = np.zeros((N_TOKENS, N_CHANNELS))
    for k in members:
        out += changes[:, k][:, None] * of.directions[k].astype(float)
    return out


def length(vectors: np.ndarray) -> float:
    return float(np.linalg.norm(vectors, axis=1).mean())


def test_scaling_writes_the_features_own_activations_or_the_declared_levels() -> None:
    one, levels = model(0), np.linspace(0.1, 2.0, N_FEATURES)
    codes = one.codes.toarray()
    each = np.broadcast_to(levels, codes.shape)
    for norm, changes in (
        (scaled(one, -1.0), -codes),
        (scaled(one, 2.0), 2 * codes),
        (scaled(one, 2.0, levels), 2 * each),
    ):
        expected = [length(written(one, changes, members)) for members in SETS]
        np.testing.assert_allclose(norm.of_each(SETS), expected)
        assert norm.of(SETS[1]) == norm.of_each(SETS)[1]


def test_copying_writes_each_models_features_with_its_own_decoder() -> None:
    base, rl = model(0), model(1)
    norm = copied(TokenCodes(base, rl, 1.0))
    expected = [
        length(written(rl, rl.codes.toarray(), members) - written(base, base.codes.toarray(), members))
        for members in SETS
    ]
    np.testing.assert_allclose(norm.of_each(SETS), expected)
    with_bases_decoder = EditNorm((ModelCodes(rl.codes - base.codes, base.directions),))
    assert not np.allclose(with_bases_decoder.of_each(SETS), expected, rtol=0.1)


def test_an_empty_list_of_sets_has_no_norms() -> None:
    assert scaled(model(0), 1.0).of_each([]).shape == (0,)

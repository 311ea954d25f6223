"""Whether a copied change does the same in both models, on changes whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlgen_stats.stores import Provenance, open_results, write_results
from rlgen_stats.toolkit.statistics.causal.causal_equivalence import causal_equivalence
from rlgen_stats.toolkit.statistics.causal.mediated_share import Curve, CurvePoint
from rlgen_stats.toolkit.statistics.kernels import bounded_interval

N = 400


LABELS = np.char.mod("p%03d", np.arange(N))


def curve(direction: str, changed: np.ndarray, *, label: str = "set", clusters: np.ndarray = LABELS) -> Curve:
    arm = {"amplify": "lift", "disable": "lower"}[direction]
    point = CurvePoint(label, 1, arm, (), 0.3, ())
    return Curve(direction, (point,), {arm: changed}, clusters)  # type: ignore[arg-type]


def changes(n: int, value: float, *, start: int = 0) -> np.ndarray:
    out = np.zeros(N)
    out[start : start + n] = value
    return out


@pytest.mark.parametrize(
    ("gained", "lost", "start", "margin", "state"),
    [
        (80, 80, 0, 0.05, "EQUIVALENT"),
        (80, 80, 80, 0.05, "UNDETERMINED"),  # the same on average, of other prompts: 0 +- .05
        (80, 80, 80, 0.06, "EQUIVALENT"),
        (80, 20, 0, 0.05, "DIFFERENT"),
        (80, 62, 0, 0.05, "DIFFERENT"),
        (80, 74, 0, 0.05, "EQUIVALENT"),
        (0, 0, 0, 0.05, "NO_EFFECT_SHOWN"),
        (3, 3, 0, 0.05, "NO_EFFECT_SHOWN"),
    ],
)
def test_states(gained: int, lost: int, start: int, margin: float, state: str) -> None:
    curves = [curve("amplify", changes(gained, 1.0)), curve("disable", changes(lost, -1.0, start=start))]
    found = causal_equivalence(curves, alpha=0.05, margin=margin)
    assert found is not None
    assert str(found["state"].item()) == state, found
    assert float(found["difference"]) == pytest.approx((gained - lost) / N)
    np.testing.assert_allclose(found["effect"].sel(direction=["amplify", "disable"]), [gained / N, -lost / N])


def test_the_limits_of_equivalence_and_of_a_difference() -> None:
    """The 90% interval decides equivalence, the 95% one a difference; each with the margin just beside its end."""
    curves = [curve("amplify", changes(80, 1.0)), curve("disable", changes(60, -1.0))]
    both = (changes(80, 1.0) + changes(60, -1.0))[:, None]
    _, _, (inner,) = bounded_interval(both, np.arange(N), alpha=0.10, limit=2.0)
    for margin, state in ((inner - 1e-6, "DIFFERENT"), (inner + 1e-6, "EQUIVALENT")):
        found = causal_equivalence(curves, alpha=0.05, margin=margin)
        assert found is not None
        assert str(found["state"].item()) == state
    assert float(found["difference_low"]) < float(found["inner_low"]) < float(found["inner_high"])


def test_order_of_directions_and_of_prompts_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    up, down, mixed = changes(90, 1.0), changes(70, -1.0, start=10), rng.permutation(N)
    one = causal_equivalence([curve("amplify", up), curve("disable", down)], alpha=0.05, margin=0.05)
    again = [curve(name, x[mixed], clusters=LABELS[mixed]) for name, x in (("disable", down), ("amplify", up))]
    other = causal_equivalence(again, alpha=0.05, margin=0.05)
    assert one is not None
    assert other is not None
    for name in ("effect", "effect_low", "difference", "difference_high", "inner_low"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-9)


def test_without_both_models_there_is_nothing_to_compare() -> None:
    lift, lower = curve("amplify", changes(80, 1.0)), curve("disable", changes(80, -1.0))
    assert causal_equivalence([lift], alpha=0.05, margin=0.05) is None
    assert causal_equivalence([lift, curve("disable", changes(8, -1.0), label="all")], alpha=0.05, margin=0.05) is None
    assert causal_equivalence([], alpha=0.05, margin=0.05) is None
    assert causal_equivalence([lift, lower], alpha=0.05, margin=0.05) is not None


@pytest.mark.slow
def test_equivalence_is_rarely_called_where_the_effects_differ_by_the_margin() -> None:
    """500 worlds whose effects differ by exactly .10: at most alpha + 3 standard errors are called equivalent."""
    rng, called = np.random.default_rng(7), 0
    for _ in range(500):
        up = (rng.uniform(size=N) < 0.3).astype(float)
        down = -(rng.uniform(size=N) < 0.2).astype(float)
        found = causal_equivalence([curve("amplify", up), curve("disable", down)], alpha=0.05, margin=0.10)
        assert found is not None
        called += str(found["state"].item()) == "EQUIVALENT"
    assert called / 500 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)


def test_it_is_stored_and_read_again(tmp_path: Path) -> None:
    """Its state is a text without a dimension."""
    curves = [curve("amplify", changes(80, 1.0)), curve("disable", changes(80, -1.0))]
    found = causal_equivalence(curves, alpha=0.05, margin=0.05)
    assert found is not None
    write_results(tmp_path / "results.zarr", "trial-one-equivalence", found, provenance=Provenance("s", "k", {}))
    read = open_results(tmp_path / "results.zarr", "trial-one-equivalence").load()
    assert str(read["state"].item()) == "EQUIVALENT"
    np.testing.assert_array_equal(read["effect"], found["effect"])

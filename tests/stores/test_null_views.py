"""Views that are base itself: base again, and base with noise as large as another model's distance from it."""

from pathlib import Path

import numpy as np
import pytest

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.schemas.null_views import HALVES_MODEL, noise_model
from rlgen_stats.stores import ActivationWriter, PairedReader, open_activations
from rlgen_stats.stores.shards import to_float32
from tests.stores.conftest import N_TOKENS, WIDTH, activation_values

NOISE = noise_model("rl@80")


def write(store: Path, model: str, values: np.ndarray, dtype: str = "float32") -> None:
    width = values.shape[1]
    with ActivationWriter(store, model=model, site="block2", width=width, dtype=dtype) as writer:
        writer.append(values)


def distances(values: np.ndarray, base: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(values.astype(np.float64) - base, axis=-1))


@pytest.mark.parametrize(("dtype", "exact"), [("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.05)])
def test_noise_is_as_large_as_the_other_models_distance_on_every_token(store: Path, dtype: str, exact: float) -> None:
    random = np.random.default_rng(0)
    base = activation_values("base@0")
    shift = random.normal(size=base.shape) * np.where(np.arange(N_TOKENS) % 3, 0.1, 5.0)[:, None]
    shift[7] = 0.0
    write(store, "base@0", base, dtype)
    write(store, "rl@80", base + shift, dtype)
    found = open_activations(store, models=["base@0", "rl@80", NOISE, HALVES_MODEL]).activation.values
    noise, wanted = distances(found[2], found[0]), distances(found[1], found[0])
    np.testing.assert_allclose(noise, wanted, rtol=exact, atol=exact)
    assert noise[7] == 0.0
    cosine = np.einsum("tc,tc->t", found[2] - found[0], found[1] - found[0]) / np.maximum(noise * wanted, 1e-12)
    assert abs(cosine.mean()) < 0.02, "of random direction"
    np.testing.assert_array_equal(found[3], found[0])


def test_every_reader_has_the_same_noise(store: Path) -> None:
    write(store, "base@0", activation_values("base@0"), "bfloat16")
    write(store, "rl@80", activation_values("rl@8000"), "bfloat16")
    whole = open_activations(store, models=["base@0", NOISE]).activation.values
    reader = PairedReader(store, ["base@0", NOISE], "block2", batch_size=700, seed=0)
    np.testing.assert_array_equal(np.concatenate(list(reader.sequential(999))), whole.transpose(1, 0, 2))
    bits = PairedReader(store, ["base@0", NOISE], "block2", batch_size=700, seed=0, dtype="stored")
    stored = np.concatenate(list(bits.sequential(999)))
    np.testing.assert_array_equal(to_float32(stored, "bfloat16"), whole.transpose(1, 0, 2))


def test_views_of_base_need_what_they_are_made_of(store: Path) -> None:
    write(store, "base@0", activation_values("base@0"))
    with pytest.raises(StoreError, match=r"no complete activations of \['rl@80'\].*run the extract stage"):
        open_activations(store, models=["base@0", NOISE])
    write(store, "rl@80", np.ones((N_TOKENS, WIDTH + 2), dtype=np.float32))
    with pytest.raises(StoreError, match=f"expects equal widths, got {WIDTH} and {WIDTH + 2} channels"):
        open_activations(store, models=["base@0", NOISE])

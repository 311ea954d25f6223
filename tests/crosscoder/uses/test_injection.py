"""Tokens put into texts: the same as one text at a time without padding, read on the inserted tokens only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlgen_stats.toolkit.crosscoder.uses.injection import Injection, injected_peaks
from tests.edits.tiny import RL, VOCABULARY, tiny_crosscoder, tiny_model

LAYER, COLUMNS = 1, [3, 11, 20]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_peaks_are_those_of_each_text_alone(batch_size: int) -> None:
    model, crosscoder = tiny_model(), tiny_crosscoder()
    readout = crosscoder.readout_map(view=RL, kind="swap", features=torch.tensor(COLUMNS))
    random = np.random.default_rng(0)
    injections = []
    for n in range(14):
        ids = tuple(int(i) for i in random.integers(1, VOCABULARY, 4 + n % 5))
        start = 1 + n % 3
        injections.append(Injection(ids, start, start + n % 3, n % len(COLUMNS)))
    got = injected_peaks(model, LAYER, readout, injections, pad=0, batch_size=batch_size)
    whole = crosscoder.readout_map(view=RL, kind="swap")
    for peak, one in zip(got, injections, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([one.ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        f = whole(states)[one.start : one.stop, COLUMNS[one.column]]
        assert peak == pytest.approx(float(f.max()) if one.stop > one.start else 0.0, abs=1e-4)
    assert (got > 0).any()

"""Features on the tokens that a trial edits, from stored activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.toolkit.statistics.causal.edit_norms import copied, scaled
from rlgen_stats.toolkit.trial import token_codes as module
from rlgen_stats.toolkit.trial.token_codes import token_codes
from tests.trial.planted import F_BRAKE, F_DECOY, F_GATE, FAINT, GROUPS, LEVEL, prompt_table

TABLE = prompt_table().set_index("prompt_id")
OF_TRIAL = TABLE.index[TABLE["split"] == "trial"].tolist()


def codes_of(study: Any, prompts: list[str]) -> Any:
    spec, folder = study
    return token_codes(spec, folder, folder.crosscoder("main"), rl="rl@1", prompts=prompts)


def gates(prompts: list[str], model: str) -> np.ndarray:
    """The gate on every token but each prompt's first: the words before a question have little of it."""
    lengths = [len(text.split()) - 1 for text in TABLE.loc[prompts, "text"]]
    return LEVEL[model] * np.concatenate([np.append(np.full(n - 1, FAINT), 1.0) for n in lengths])


def test_norms_are_those_of_the_planted_edits(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "N_TOKENS", 10**6)  # all tokens
    codes = codes_of(study, OF_TRIAL)
    base, rl = (gates(OF_TRIAL, model) for model in ("base@0", "rl@1"))
    assert scaled(codes.rl, -1.0).of([F_GATE]) == pytest.approx(rl.mean(), rel=1e-4)
    assert scaled(codes.base, 1.0).of([F_GATE]) == pytest.approx(base.mean(), rel=1e-4)
    assert codes.difference == pytest.approx((rl - base).mean(), rel=1e-4)
    assert copied(codes).of([F_GATE]) == pytest.approx((rl - base).mean(), rel=1e-4)
    assert copied(codes).of([F_DECOY]) == pytest.approx(0, abs=1e-4), "no decoy differs"
    pair = [F_DECOY, F_DECOY + GROUPS.index((0, 2))]  # channels 0 and 1, and 0 and 2: what they share adds up
    alone = np.array([scaled(codes.rl, 1.0).of([k]) for k in pair])
    joint = scaled(codes.rl, 1.0).of(pair)
    assert np.hypot(*alone) < joint < alone.sum()
    assert scaled(codes.rl, 1.0).of([F_GATE, F_BRAKE]) < scaled(codes.rl, 1.0).of([F_GATE]) + scaled(codes.rl, 1.0).of(
        [F_BRAKE]
    )


def test_a_sample_of_prompts_is_whole_prompts_of_the_trial(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "N_TOKENS", 60)
    codes = codes_of(study, OF_TRIAL)
    n_tokens = codes.rl.codes.shape[0]
    assert 40 <= n_tokens <= 80
    assert (codes.rl.codes[:, [F_GATE]].toarray() > 1.9).sum() == pytest.approx(n_tokens / 3.4, abs=8)
    np.testing.assert_array_equal(codes_of(study, OF_TRIAL[::-1]).rl.codes.toarray(), codes.rl.codes.toarray())


def test_prompts_without_an_edited_token_have_no_norm(study: Any) -> None:
    spec, folder = study
    how = spec.extraction.model_copy(update={"skip_first": 4})
    short = [prompt for prompt in OF_TRIAL if len(TABLE.loc[prompt, "text"].split()) == 3]
    with pytest.raises(NotEstimableError, match="no_edit_norm: no stored token"):
        codes_of((spec.model_copy(update={"extraction": how}), folder), short)

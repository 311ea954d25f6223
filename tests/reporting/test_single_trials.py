"""What a feature does alone, and whether it does the same in both models, as its section says it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.reporting import feature_cards, read_study_data
from rlgen_stats.toolkit.reporting.report import environment
from rlgen_stats.toolkit.reporting.trial_rows import (
    equivalence_sentence,
    in_dictionary,
    of_first_dictionary,
    single_trials,
)
from rlgen_stats.toolkit.statistics.causal.causal_equivalence import causal_equivalence
from rlgen_stats.toolkit.statistics.causal.mediated_share import Curve, CurvePoint
from tests.reporting.synthetic_study import intervention, make_spec, other_parts

N = 200


def equivalence(gained: int, lost: int, *, start: int = 0) -> xr.Dataset:
    def curve(direction: Any, n: int, value: float, start: int = 0) -> Curve:
        changed = np.zeros(N)
        changed[start : start + n] = value
        return Curve(
            direction, (CurvePoint("set", 1, "copy", (), 0.3, ()),), {"copy": changed}, np.arange(N).astype(str)
        )

    found = causal_equivalence(
        [curve("amplify", gained, 1.0), curve("disable", lost, -1.0, start)], alpha=0.05, margin=0.05
    )
    assert found is not None
    return found


@pytest.fixture
def tried(results: dict[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Feature 7 was tried alone, in the first dictionary and (another feature of that number) in the second."""
    trial = intervention().assign_attrs(features=[7], level="own")
    names = {"trial-features-7": trial, "trial-features-7-in-2": trial, "trial-dictionary.2": trial}
    return results | names | {"trial-features-7-equivalence": equivalence(60, 60)}


def test_trials_of_one_feature_are_told_from_others(tried: dict[str, xr.Dataset]) -> None:
    found = single_trials(tried, "rl")
    assert {feature: [one["trial"] for one in trials] for feature, trials in found.items()} == {7: ["features-7"]}
    (trial,) = found[7]
    assert [row["edit"] for row in trial["edits"]][:1] == ["switched off in rl"]
    assert "amplified in base" in [row["edit"] for row in trial["edits"]]
    assert not [row for row in trial["edits"] if row["arm"].kind not in ("set", "lift", "lower")]


@pytest.mark.parametrize(
    ("group", "first"),
    [
        ("trial-features-7", True),
        ("trial-features-7-in-2", False),
        ("trial-selected-in-12-x4", False),
        ("trial-dictionary", True),
        ("trial-dictionary.2", False),
        ("selected-in-2", False),
    ],
)
def test_numbers_of_another_dictionary_are_other_features(group: str, first: bool) -> None:
    assert of_first_dictionary(group) is first


def test_results_of_one_dictionary_are_named_as_if_there_were_no_other() -> None:
    names = ("drift", "drift.2", "drift.3", "movement", "matching", "intervention", "trial-dictionary")
    names += ("trial-dictionary.2", "trial-features-7", "trial-features-7-in-2", "trial-features-7-in-2-equivalence")
    results = {name: xr.Dataset(attrs={"of": name}) for name in names}
    shown = {name: data.attrs["of"] for name, data in in_dictionary(results, 2).items()}
    assert shown == {
        "drift": "drift.2",
        "movement": "movement",
        "matching": "matching",
        "intervention": "trial-dictionary.2",
        "trial-features-7": "trial-features-7-in-2",
        "trial-features-7-equivalence": "trial-features-7-in-2-equivalence",
    }
    assert set(in_dictionary(results, 1)) == set(names)


@pytest.mark.parametrize(
    ("gained", "lost", "start", "words"),
    [
        (
            60,
            60,
            0,
            "Its change does the same in both models: put into base +30.0 pts of accuracy, taken out of the RL model",
        ),
        (60, 10, 0, "Its change does not do the same in both models"),
        (60, 60, 60, "Whether its change does the same in both models is open"),
        (0, 0, 0, "Its change is not shown to do anything in either model"),
    ],
)
def test_the_sentence_follows_the_state(gained: int, lost: int, start: int, words: str) -> None:
    sentence = equivalence_sentence(equivalence(gained, lost, start=start))
    assert sentence.startswith(words)
    for part in (
        "95% [",
        "90% [",
        "within ±5 points",
        "(200 trial prompts, clusters as units)",
        "Not corrected over features",
    ):
        assert part in sentence
    assert equivalence_sentence(None) == ""


def test_the_section_shows_them(written: StudyFolder, tried: dict[str, xr.Dataset]) -> None:
    spec = make_spec()
    data = read_study_data(written, spec)
    section: Any = environment().get_template("feature_section.html.j2").module
    shown, other = (str(section.feature(card, {})) for card in feature_cards(written, spec, tried, data, [7, 19]))
    assert "(trial features-7)" in shown
    assert "<b>Causal equivalence.</b> Its change does the same in both models" in shown
    assert "features-7-in-2" not in shown
    assert "has not been tried" not in shown
    assert "rlgen-stats intervene STUDY --features 19" in other
    parts = other_parts().assign_coords(feature=[19, 88])
    (card,) = feature_cards(written, spec, tried | {"trial-selected-in-2-features": parts}, data, [19])
    assert card.alone == []

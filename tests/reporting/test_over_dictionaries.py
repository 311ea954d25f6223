"""The section on other dictionaries: one set of numbers in every format, and sentences that follow from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder
from rlgen_stats.toolkit.reporting import write_report
from rlgen_stats.toolkit.reporting.figures.agreement_ladder import agreement_ladder
from rlgen_stats.toolkit.reporting.over_dictionaries import counts_note, pair_rows, sentences, span, why_absent

Results = dict[str, xr.Dataset]


def test_the_sentences_have_the_planted_numbers(results: Results, spec: StudySpec) -> None:
    matched, agree, meaning = sentences(results, spec)
    assert matched == (
        "Of the first dictionary’s 230 features that fire, 50% and 60% have a match in dictionaries 2 and 3 that is "
        "better than chance, 8% and 9% a close one (cosine 0.7 or more). The close ones carry 61% and 58% of the drift "
        "of rl (8% and 9% if as many were matched at random, so more than chance), and 22 and 21 of its 50 most "
        "changed features have their match among the other’s 50 (3.9 and 3.6 expected at random)."
    )
    assert agree == (
        "The selected sets’ drift per prompt correlates 0.82 to 0.84 between dictionaries (random sets 0.37 to 0.39); "
        "the whole changes that they decode correlate 0.92 to 0.94, the errors that these leave 0.67 to 0.69."
    )
    assert meaning == "A feature number therefore means something in its own dictionary only."


def test_other_numbers_make_other_sentences(results: Results, spec: StudySpec) -> None:
    data = results["replicability"]
    results["replicability"] = data.assign(matched_energy_random_high=data["matched_energy"] + 0.1)
    assert "matched at random, within what chance gives)" in sentences(results, spec)[0]
    one_above = data["matched_energy"] + xr.DataArray([-0.1, 0.1], dims="replicate")
    results["replicability"] = data.assign(matched_energy_random_high=one_above.transpose(*data["matched_energy"].dims))
    assert "matched at random), and 22" in sentences(results, spec)[0]
    results["replicability"] = data.assign(n_matched=0 * data["n_matched"], matched_share=0 * data["matched_share"])
    told = sentences(results, spec)
    assert told[0] == "None of the first dictionary’s 230 features that fire has a match in another dictionary."
    assert told[2].startswith("A feature number")
    results["replicability"] = data.assign(matched_share=0 * data["matched_share"] + 0.8)
    assert sentences(results, spec)[2].startswith("Most features of the first dictionary have a close counterpart")
    results["replicability"] = data.assign(set_correlation=np.nan * data["set_correlation"])
    assert sentences(results, spec)[1].startswith("The selected sets cannot be compared, since fewer than two")


def test_counts_stand_beside_their_mean(results: Results, spec: StudySpec) -> None:
    assert counts_note(results, spec) == (
        "Features called DRIFT in dictionaries 1, 2 and 3: sft 60, 66 and 63 (mean 63, interval [56, 70]); "
        "rl 40, 44 and 42 (mean 42, interval [37, 47]); intervals are over dictionaries. Selected: 5, 6 and 5."
    )


def test_one_row_a_pair_in_every_format(report: Path, results: Results, spec: StudySpec) -> None:
    rows = pair_rows(results, spec)
    assert rows[["run", "dictionary", "other"]].to_numpy().tolist() == [
        [run, i, j] for run in ("sft", "rl") for i, j in ((1, 2), (1, 3), (2, 3))
    ]
    assert np.isnan(rows["matched_share"][rows["dictionary"] == 2]).all()
    assert (rows["top_shared"].iloc[4], rows["close_top_shared"].iloc[4]) == (21, 11)
    table = pd.read_csv(report / "tables/replicability.csv")
    pd.testing.assert_frame_equal(table, rows, check_dtype=False)
    told: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))["over_dictionaries"]
    assert [row["set_correlation"] for row in told["pairs"]] == rows["set_correlation"].tolist()
    assert told["sentences"] == list(sentences(results, spec))
    page, markdown = ((report / name).read_text(encoding="utf-8") for name in ("index.html", "report.md"))
    for sentence in told["sentences"]:
        assert sentence in page
        assert sentence.partition(" (")[0] in markdown
    assert "<td>1 and 3</td>" in page
    assert "| rl@80 | 1 and 3 | 60.0% | 9.0% | 58.0% (9.0%) | 21 (3.6) |" in markdown
    assert page.index('id="replicability"') < page.index('<section id="C1"')


@pytest.mark.parametrize("replicates", [1, 2])
def test_what_is_not_there_is_said(
    replicates: int,
    spec_with: Callable[..., StudySpec],
    empty_folder: StudyFolder,
    provenance: Provenance,
    without_figures: None,
) -> None:
    main = {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "replicates": replicates}
    study = spec_with(crosscoders=[main])
    assert sentences({}, study) == ()
    assert counts_note({}, study) == ""
    expected = {1: "This study has one dictionary (replicates: 1), so", 2: "The analysis ‘replicability’ has not been"}
    assert why_absent({}, study).startswith(expected[replicates])
    write_report(empty_folder, study, provenance=provenance)
    for name in ("index.html", "report.json"):
        assert expected[replicates] in (empty_folder.report / name).read_text(encoding="utf-8")
    assert not (empty_folder.report / "tables/replicability.csv").exists()


def test_the_figure_says_what_it_shows(results: Results, spec: StudySpec) -> None:
    alt = agreement_ladder(results, spec).alt
    assert "rl: features matched 0.50 to 0.60, features matched closely 0.08 to 0.09, drift that the close carry" in alt
    assert "top features matched in top 0.42 to 0.44 (random 0.08)" in alt
    assert "error of the decoded change 0.67 to 0.69" in alt
    assert span([np.nan, 0.104, 0.101]) == "0.10"
    assert span([np.nan]) == "—"

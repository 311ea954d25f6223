"""The written report: complete, self-contained, escaped, consistent with itself, and the same every time."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.schemas.layout import LAYOUTS
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, write_results
from rlgen_stats.toolkit.reporting import Graphic, Missing, load_results, read_study_data, write_report
from rlgen_stats.toolkit.reporting.arm_rows import direction_blocks, side_effect_rows
from rlgen_stats.toolkit.reporting.csv_tables import build_tables, class_counts, drift_summary, matching_summary
from rlgen_stats.toolkit.reporting.feature_cards import Context, near_identical, split_peak
from rlgen_stats.toolkit.reporting.feature_table import shown_of
from rlgen_stats.toolkit.reporting.figures.overview import STEPS
from rlgen_stats.toolkit.reporting.formatting import compact, fixed, interval, p_text, percent, points
from rlgen_stats.toolkit.reporting.headline import domain_accuracies
from rlgen_stats.toolkit.reporting.population import populations
from rlgen_stats.toolkit.reporting.report import GROUPS
from rlgen_stats.toolkit.reporting.result_lookup import tidy
from tests.reporting.synthetic_study import N_FEATURES

VOID = {"meta", "link", "br", "img", "hr", "input", "line", "circle", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks nesting and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.stack, f"unclosed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.stack[-1:] == [tag], f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "svg", "title"} & set(self.stack):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(report: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return loaded


def test_files(report: Path, drawn: dict[str, Graphic | Missing]) -> None:
    pages = {f"features-{i}.html" for i in range(1, 6)}  # 235 features that are not selected, 50 a page
    assert {p.name for p in report.iterdir()} == pages | {
        "index.html",
        "features.html",
        "prompts.html",
        "report.md",
        "report.json",
        "figures",
        "tables",
    }
    files = {file for figure in drawn.values() if isinstance(figure, Graphic) for file in figure.files}
    assert {path.name for path in (report / "figures").glob("*.svg")} == files
    assert not [p for p in report.parent.iterdir() if p.name.endswith((".partial", ".old"))]


def test_the_page_begins_with_the_answer_five_verdicts_and_the_six_steps(report: Path, page: Page) -> None:
    order = [attrs["id"] for attrs in page.named("section")]
    assert order[:2] == ["behaviour", "claims"]
    assert [name for name in order if name in ("C1", "C2", "C3", "C4", "C5")] == ["C1", "C2", "C3", "C4", "C5"]
    text = page.text
    first = "rl raised out-of-domain accuracy from 29% to 69% (sft 24%; greedy, 300 prompts)"
    carried = "copied into base, the 5 features selected carry 70% [55%, 85%] of what copying the whole residual does"
    edits = (
        "and that switching the selected features off specifically lowers rl’s accuracy and that turning them up "
        "specifically raises base’s is supported (C4 and C5)."
    )
    shown = (first, carried, edits, "SFT adds more own features", "What editing does", "Level α")
    places = [text.index(words) for words in shown]
    assert places == sorted(places)
    assert places[-1] < text.index("The five claims")
    chips = [attrs["href"] for attrs in page.named("a") if "chip" in str(attrs.get("class"))]
    assert chips == ["#C1", "#C2", "#C3", "#C4", "#C5"]
    steps = [attrs["id"] for attrs in page.named("figure") if str(attrs["id"]).startswith("overview-")]
    assert steps == [f"overview-{name}" for name in STEPS]
    markdown = (report / "report.md").read_text(encoding="utf-8")
    assert all(
        words in markdown for words in (first, "- **C3** A few features carry", "1. **Behaviour.** Out of domain")
    )


def test_completions_that_were_cut_off_or_not_read_are_warned_about(
    report: Path, page: Page, data: dict[str, Any]
) -> None:
    """In the synthetic study 6% of the completions of 'maximum' are cut off, and 15% of those of 'parity' not read."""
    warnings = data["behaviour"]["warnings"]
    n_models = len({row["model"] for row in data["behaviour"]["tasks"]})
    assert len(warnings) == 2 * n_models
    said = " ".join(warnings)
    assert "6% of rl@80's sampled completions of task maximum were cut off by the length limit" in said
    assert "15% of rl@80's sampled completions of task parity have no answer that its grader can read" in said
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for text in (page.text, markdown.replace("\\", "")):
        assert all(warning in text for warning in warnings)
    assert "parity rl@80 97.0% 85.0%" in page.text
    assert "| parity | rl@80 | 97.0% | 85.0% |" in markdown
    assert page.text.count("base says <b>so</b> & ends . ans") >= 5
    assert "Not read in parity, base@0" in page.text


# -- one set of numbers ------------------------------------------------------------------------------------------
def test_claims_agree_between_html_json_csv_and_markdown(report: Path, page: Page, data: dict[str, Any]) -> None:
    table = pd.read_csv(report / "tables" / "claims.csv")
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for row, claim in zip(table.to_dict("records"), data["claims"], strict=True):
        for name in ("estimate", "low", "high", "p_value"):
            assert (claim[name] is None and pd.isna(row[name])) or row[name] == claim[name]
        assert row["verdict"] == claim["verdict"]
        shown = f"{claim['statement']} ✓ supported"
        assert shown in re.sub(r"\s+", " ", page.text)
        number = "5 features" if claim["unit"] == "features" else f"{fixed(claim['estimate'], sign=True)} points"
        for text in (page.text, markdown):
            assert number in text
            assert p_text(claim["p_value"]) in text
        if claim["high"] is not None:
            assert interval(claim["low"], claim["high"], sign=True) in page.text


def test_domains_agree_between_html_json_and_csv(report: Path, page: Page, data: dict[str, Any]) -> None:
    table = pd.read_csv(report / "tables" / "domains.csv")
    assert len(table) == 6
    for row, domain in zip(table.to_dict("records"), data["behaviour"]["domains"], strict=True):
        assert row["accuracy"] == domain["accuracy"]
        assert percent(domain["accuracy"]) in page.text
        assert interval(domain["low"], domain["high"], scale=100) in page.text
        if domain["run"] != "base":
            assert points(domain["difference"]) in page.text
    out = table[(table.run == "rl") & (table.domain == "out")].iloc[0]
    assert (out.gained, out.forgotten, out.n_prompts) == (130, 10, 300)


def test_causal_arms_agree(report: Path, page: Page) -> None:
    arms = pd.read_csv(report / "tables" / "intervention.csv").set_index(["direction", "condition"])
    row = arms.loc[("disable", "dose-0.5")]
    assert row.effect == pytest.approx(-0.16)
    cells = f"dose 0.5 0.5 {percent(row.accuracy)} {fixed(100 * row.effect, sign=True)}"
    assert cells in re.sub(r"\s+", " ", page.text)
    assert compact(row.kl_to_base) in page.text
    shares = [name for name in arms.columns if name.startswith("share_")]
    assert arms[shares].sum(axis=1).to_numpy() == pytest.approx(1)


def test_a_single_random_set_is_told_with_its_own_interval(results: dict[str, xr.Dataset]) -> None:
    data = results["intervention"]
    kinds = data["kind"].sel(direction="disable").values.astype(str)
    first = np.flatnonzero(kinds == "random")[0]
    kept = data.isel(condition=[i for i, kind in enumerate(kinds) if kind != "random" or i == first])
    own = kept.sel(direction="disable", condition=str(data["condition"].values[first]))
    (row,) = (row for row in side_effect_rows(kept, "disable") if row["label"] == "1 random set")
    assert not row["several"]
    assert (row["unrelated_low"], row["unrelated_high"]) == (own["unrelated_low"], own["unrelated_high"])
    (block, *_) = direction_blocks(kept)
    (random, *_) = block["random"]
    assert (random["label"], random["several"]) == ("1 random set", False)
    assert (random["low"], random["high"]) == (own["effect_low"], own["effect_high"])


def test_divergences_are_those_that_v6_judges(results: dict[str, xr.Dataset]) -> None:
    """Over whole completions where these were read, of random sets none; the first token can say the opposite."""
    trial = results["intervention"]
    read = trial["kind"] != "random"
    forced = {f"forced_{name}": (2.0 + trial[name]).where(read) for name in ("kl_to_base", "kl_to_rl")}
    for data, more in ((trial, 0.0), (trial.assign(forced), 2.0)):
        block = direction_blocks(data)[0]
        at = trial.isel(direction=0, condition=int(np.flatnonzero(trial["kind"].values[0] == "set")[0]))
        own = next(arm for arm in block["arms"] if arm.kind == "set")
        assert (own.kl_to_base, own.kl_to_rl) == (float(at["kl_to_base"]) + more, float(at["kl_to_rl"]) + more)
        assert np.isnan(block["random"][0]["kl_to_base"]) == bool(more)


def test_side_effects_and_other_trials_are_told(page: Page, data: dict[str, Any]) -> None:
    text = page.text
    assert "Side effects: unrelated tasks" in text
    assert text.count("“Set in …”: the set’s matched features in a dictionary of another seed.") == 2
    assert text.count("set in main.2") == 4, "what it does, and its side effects, in two directions"
    assert "the set 74.7% −0.3 [−4.3, 3.7] 1.2% 6.2 0.032" in text.replace("+3.7", "3.7"), text
    assert text.count("passthrough 75.0% none: no answer changed") == 2
    assert text.count("none: no completion changed") == 2
    assert text.count("On: Trial prompts of riddle; 1 completion a prompt") == 2
    assert re.search(r"24 random sets median and range 7\d\.\d% −2\.\d \[−3\.3, −1\.0\]", text), "range over sets"
    (trial,) = data["trials"]
    assert (trial["name"], trial["direction"], trial["verdict"]) == ("features-3-9", "disable", "CAUSAL_NONSPECIFIC")
    assert trial["reason"] == "matched random sets have at least as large an effect"
    assert trial["effect"] == pytest.approx(-0.35)
    assert "features-3-9 disable 2 0" in text
    assert "not corrected for the number of trials" in text
    strongest = text.index("9 −30.0 [−34.0, −26.0]")
    assert strongest < text.index("3 −5.0 [−9.0, −1.0]"), "in the order of the search"
    assert "1 of 2 features; on prompts not used to choose them: the smaller set −31.0" in text


def test_json_is_strict_and_names_what_is_there(data: dict[str, Any], report: Path) -> None:
    assert data["analyses"]["missing"] == []
    assert {c["verdict"] for c in data["claims"]} == {"SUPPORTED"}
    for entry in data["figures"].values():
        assert entry["files"]
        assert all((report / file).exists() for file in entry["files"])
    for file in data["tables"].values():
        assert len(pd.read_csv(report / file)) > 0
    assert "NaN" not in (report / "report.json").read_text(encoding="utf-8")


def test_study_facts_are_shown(page: Page) -> None:
    for fact in (
        "The prompt; never the token.",
        "56 prompts in 28 clusters and 7 tasks (8 in domain, 40 out, 8 of negative controls).",
        "28 selection, 28 verification.",
        "split-hash-89ab",
        "1 sft and 1 rl",
        "Forced: every model reads the same tokens.",
        "Swap: a model's activation is the input of every view.",
        "30 of 240 features",
        "study 5; derived:",
        "numpy",
        "study-hash-0123",
        "key-hash-4567",
        "crosscoder-hash-cdef",
        "a family",
        "a null",
        "Held out: reversal and sorting; negative controls: riddle.",
    ):
        assert fact in page.text


def test_tables_of_the_contrast(results: dict[str, xr.Dataset], spec: StudySpec) -> None:
    rest: dict[str, Any] = {"claims": (), "domains": [], "facts": [], "said_of": {}}
    tables = build_tables(results, spec, **rest)
    assert tables["attribution_contrast"]["comparison"].tolist() == [
        *("final", "final", "matched_shift", "matched_shift", "matched_kl", "matched_kl")
    ]
    assert tables["attribution_comparisons"]["superiority"].tolist()[0] == 0.61
    assert tables["attribution_floors"]["tail_floor"].tolist() == [0.0, 0.0, 0.004, 0.0]
    without = {"attribution_contrast": results["attribution_contrast"].drop_dims("floor")}
    assert "attribution_floors" not in build_tables(without, spec, **rest)


def test_what_could_not_be_tested_is_not_called_drift(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert "- Features untestable in the drift of rl (base and final model together): 30 of 240 features" in text
    assert "- Stabilisation of rl (all its checkpoints and base together): " in text
    assert "- Drift of rl" not in text


def test_one_run_per_arm_is_explained(page: Page) -> None:
    assert "It cannot show that SFT and RL differ" in page.text


# -- self-contained, escaped, readable ---------------------------------------------------------------------------
PAGES = ("index.html", "features.html", "features-1.html", "prompts.html")


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched(name: str, report: Path) -> None:
    text = (report / name).read_text(encoding="utf-8")
    page = Page(text)
    assert page.named("script") == [{}] * (name == "features.html"), "the table's own script, inside the file"
    assert not page.named("img")
    assert not page.named("iframe")
    assert [attrs["href"] for attrs in page.named("link")] == ["data:,"]
    assert not [attrs for _, attrs in page.tags for key in attrs if key == "src" or key.startswith("on")]
    assert not re.findall(r"@import|url\((?!#)", text)
    links = [str(attrs["href"]) for attrs in page.named("a")]
    assert not [link for link in links if link.startswith("feature:")]
    outside = [link for link in links if re.match(r"[a-z]+:", link)]
    assert all(link.startswith(("https://arxiv.org/", "https://doi.org/")) for link in outside)
    for link in set(links) - set(outside):
        file, _, anchor = link.partition("#")
        target = report / (file or name)
        assert target.exists(), link
        if anchor:
            assert f'id="{anchor}"' in target.read_text(encoding="utf-8"), link


def test_hostile_text_is_escaped(report: Path, hostile: str) -> None:
    index = (report / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in index
    assert hostile in Page(index).text
    features = (report / "features.html").read_text(encoding="utf-8")
    assert "<i>step</i>" not in features
    assert "&lt;i&gt;step&lt;/i&gt; <mark>the</mark>" in features
    assert "<b>so</b>" not in index


def test_hostile_names_are_escaped_everywhere(
    spec: StudySpec,
    results: dict[str, xr.Dataset],
    provenance: Provenance,
    empty_folder: StudyFolder,
) -> None:
    evil = r"<img src=x onerror=alert(1)>|`x` $\frac$"  # a broken formula, if dollars meant formulas
    for group in ("behaviour", "selection", "intervention"):
        names = [evil if task == "parity" else task for task in results[group].task.values]
        write_results(empty_folder.results, group, results[group].assign_coords(task=names), provenance=provenance)
    write_report(empty_folder, spec, provenance=provenance)
    for name in ("index.html", "features.html", "report.md", "figures/accuracy.svg"):
        assert "<img" not in (empty_folder.report / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("name", PAGES)
def test_readable_without_a_mouse_or_eyes(name: str, report: Path) -> None:
    page = Page((report / name).read_text(encoding="utf-8"))
    assert page.named("html")[0]["lang"] == "en"
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.named(landmark)) == 1, landmark
    first_link = page.named("a")[0]
    assert (first_link["class"], first_link["href"]) == ("skip", "#main")
    assert len(page.named("table")) == len(page.named("caption"))
    assert all(attrs.get("scope") for attrs in page.named("th"))
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for attrs in page.named("section"):
        assert attrs.get("aria-labelledby", ids[0]) in ids
    for attrs in page.named("svg"):
        assert attrs.get("aria-hidden") == "true" or attrs.get("role") == "img"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_style_covers_focus_print_and_dark(report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    for rule in (":focus-visible", "@media print", "prefers-color-scheme: dark"):
        assert rule in text


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_enough_contrast(report: Path) -> None:
    """WCAG 2.2 AA, 4.5 to 1, for text in both themes."""
    css = (report / "index.html").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)[:2]
    for block in blocks:
        tokens = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        pairs = [(text, back) for text in ("ink", "soft", "muted", "link") for back in ("page", "card")]
        pairs += [(name, f"{name}-bg") for name in ("good", "bad", "warn", "open")]
        pairs += [(name, "page") for name in ("fig-ink", "fig-muted")]
        for text, back in pairs:
            light, dark = sorted((_luminance(tokens[text]), _luminance(tokens[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, back)


# -- features and examples -----------------------------------------------------------------------------------------
def test_every_feature_has_a_row_and_a_section(report: Path, data: dict[str, Any]) -> None:
    page = Page((report / "features.html").read_text(encoding="utf-8"))
    sections = {attrs["id"] for attrs in page.named("section")}
    assert sections == {"all"} | {f"feature-{entry['feature']}" for entry in data["features"]}
    assert len(sections) == 6
    rows = [attrs["data-v"] for attrs in page.named("th") if attrs.get("data-v")]
    assert sorted(map(int, rows)) == list(range(N_FEATURES)), "every feature once"
    assert [int(row) for row in rows[:5]] == [entry["feature"] for entry in data["features"]], "the edited ones first"
    others = [Page(path.read_text(encoding="utf-8")) for path in sorted(report.glob("features-*.html"))]
    elsewhere = {attrs["id"] for other in others for attrs in other.named("section")}
    assert sections - {"all"} | elsewhere == {f"feature-{k}" for k in range(N_FEATURES)}
    assert not sections & elsewhere


def test_contexts_stand_side_by_side_and_near_identical_ones_once(report: Path) -> None:
    """Each feature has nine top contexts that differ in a number and their model: one row, two more prompts' worth."""
    page = Page((report / "features.html").read_text(encoding="utf-8"))
    assert page.text.count("Top contexts of all models among the study’s texts, near-identical ones once") == 5
    assert page.text.count("step by <i>step</i> the sum of 0") == 5 * (1 + 3)
    assert page.text.count("A random sample of the tokens on which it fires in base@0") == 5
    assert page.text.count("<t1> · <t2>") == 5 + 5, "the table, and the sections"
    assert page.text.count("<t-1> · <t-2>") == 5, "suppressed tokens"
    assert "Change from base along the checkpoints" in page.text
    assert "Its match in the other dictionaries" in page.text


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("take 1 2 ⟦:⟧ ans 3 <eos>", "take 7 11 ⟦:⟧ ans 18 <eos>", True),
        ("far away words take 1 2 ⟦:⟧ ans 3 x", "other words take 1 2 ⟦:⟧ ans 3 x", True),
        ("take 1 2 ⟦:⟧ ans 3 <eos>", "give 1 2 ⟦:⟧ ans 3 <eos>", False),
        ("take 1 2 ⟦:⟧ ans 3", "take 1 2 ⟦;⟧ ans 3", False),
    ],
)
def test_near_identical_contexts_share_the_peak_and_three_words_beside_it(first: str, second: str, alike: bool) -> None:
    keys = []
    for text in (first, second):
        before, peak, after = split_peak(text)
        context = Context(
            before=before, peak=peak, after=after, activation=1.0, prompt="p", source="base@0", position=1, elsewhere={}
        )
        keys.append(near_identical(context))
    assert (keys[0] == keys[1]) is alike


@pytest.mark.parametrize(
    ("tier", "specific", "word"),
    [
        ("CONFIRMED", "CONFIRMED", "confirmed"),
        ("CONFIRMED", "REJECTED", "rises"),
        ("CONFIRMED", "", "rises"),
        ("CANDIDATE", "REJECTED", "candidate"),
        ("", "", ""),
        (float("nan"), float("nan"), ""),
    ],
)
def test_only_features_that_c3_counts_are_called_confirmed(tier: object, specific: object, word: str) -> None:
    """Such as eleven "confirmed" features under a claim that counts none."""
    assert shown_of({"tier": tier, "specific_tier": specific}) == word


def test_prompts_show_what_every_model_said(report: Path) -> None:
    page = Page((report / "prompts.html").read_text(encoding="utf-8"))
    assert {attrs["id"] for attrs in page.named("section")} >= {"prompt-parity-0"}
    for run in ("base", "sft", "rl"):
        assert f"{run} says <b>so</b> & ends" in page.text


def test_figures_captions_and_populations_survive_in_markdown(
    report: Path, drawn: dict[str, Graphic | Missing], data: dict[str, Any]
) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8").replace("\\", "")
    for name, one in drawn.items():
        assert isinstance(one, Graphic)
        assert f"**{one.title}.** {one.caption[:60]}" in markdown.replace("&gt;", ">"), name
        assert data["figures"][name]["population"] in markdown
        assert all(f"](figures/{file})" in markdown for file in one.files)
    for claim in data["claims"]:
        assert claim["population"] in markdown.replace("&gt;", ">")


def test_every_analysis_names_its_population_on_the_page_and_in_markdown(
    report: Path, written: StudyFolder, spec: StudySpec
) -> None:
    said_of = populations(load_results(written), spec, read_study_data(written, spec).prompts)
    page, markdown = ((report / name).read_text(encoding="utf-8") for name in ("index.html", "report.md"))
    page, markdown = (_letters(re.sub("<[^>]*>|&gt;|&lt;", "", text)) for text in (page, markdown))
    assert said_of.keys() >= {"balance", "tokens", "side_effects", "copying", "health", "dictionaries"}
    for name, sentence in said_of.items():
        assert _letters(sentence.replace(">", "")) in page, name
        assert _letters(sentence.replace(">", "")) in markdown, name


def test_populations_count_what_a_number_is_of(
    results: dict[str, xr.Dataset], written: StudyFolder, spec: StudySpec
) -> None:
    """Prompts of tasks that choose features, controls where they are shown, and the models that are compared."""
    prompts = read_study_data(written, spec).prompts
    assert prompts is not None
    choosing = ~prompts["task"].isin([*spec.selection.held_out_tasks, *spec.selection.control_tasks])
    n = prompts[choosing]["split"].value_counts()
    contrast = results["attribution_contrast"].assign_attrs(decided_by="matched_shift")
    said_of = populations(results | {"attribution_contrast": contrast}, spec, prompts)
    n_tokens = results["health"]["l0"].rename(crosscoder="model").assign_coords(model=list("abcd")) * 0 + 16384
    sampled = results | {"health": results["health"].assign(n_tokens_model=n_tokens.expand_dims(crosscoder=4))}
    assert "of completions, as stored; readouts of single models: 16,384 tokens" in populations(sampled, spec)["health"]
    assert "readouts" not in said_of["health"], "an earlier release did not store how many"
    assert n["selection"] < prompts["split"].value_counts()["selection"]
    assert f"Chosen on {n['selection']} selection prompts, confirmed on {n['verification']}" in said_of["which"]
    assert said_of["scores"].startswith(f"Of {n['selection']} selection prompts those that base got wrong")
    assert "control" in said_of["tasks"]
    assert "control" not in said_of["behaviour"]
    compared = str(contrast["comparable"].sel(comparison="matched_shift").item()).partition(": ")[2].partition(";")[0]
    assert (compared in said_of["whose"], compared in said_of["finals"]) == (True, False)


def test_headings_and_captions_survive_in_markdown(report: Path) -> None:
    """Every one of the page is in the plain text too, in the same order but for where details are folded."""
    page, markdown = ((report / name).read_text(encoding="utf-8") for name in ("index.html", "report.md"))
    page = re.sub(r"(?s)<svg.*?</svg>|<a [^>]*>SVG.*?</a>|<header.*?</header>", "", page)
    markdown = _letters(markdown.replace("\\", ""))
    parts = re.findall(r"(?s)<(h[23]|caption|figcaption)\b[^>]*>(.*?)</\1>", page)
    assert len(parts) > 50
    assert not [text for _, text in parts if _letters(re.sub("<[^>]*>", "", text)) not in markdown]


def _letters(text: str) -> str:
    return re.sub(r"\W", "", html.unescape(text))


def test_tables_in_markdown_have_cells_for_every_column(report: Path) -> None:
    lines = (report / "report.md").read_text(encoding="utf-8").replace("\\|", "").splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(tables) > 8
    for i in tables:
        rows = [lines[i - 1], *itertools.takewhile(lambda line: line.startswith("|"), lines[i:])]
        assert lines[i - 2] == "", "a table begins a block"
        assert len(rows) > 2, lines[i - 1]
        assert len({row.count("|") for row in rows}) == 1, rows


def test_a_feature_is_one_click_from_its_dot(report: Path) -> None:
    """Dots of the drift figure are links to features' sections, here and in the file of the figure."""
    index = (report / "index.html").read_text(encoding="utf-8")
    drift = index[index.index('id="fig-drift"') :]
    links = re.findall(r'<a href="(features[^"]*#feature-\d+)" tabindex="-1">', drift)
    assert len(links) > N_FEATURES
    file = (report / "figures" / "drift.svg").read_text(encoding="utf-8")
    assert f'<a href="../{links[0]}" tabindex="-1">' in file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a ⟦b⟧ c", ("a ", "b", " c")),
        ("no mark", ("no mark", "", "")),
        ("open ⟦b", ("open ⟦b", "", "")),
        ("", ("", "", "")),
    ],
)
def test_peak_marks(text: str, parts: tuple[str, str, str]) -> None:
    assert split_peak(text) == parts


def test_examples_are_the_first_of_their_task(page: Page) -> None:
    """RL is right everywhere; base is right on every third prompt, SFT on every second."""
    assert "Gained by rl · maximum" in page.text
    assert "Forgotten by sft" in page.text
    assert "base says <b>so</b> & ends" in page.text
    assert "✕ wrong, answer" in page.text


# -- what may be missing -------------------------------------------------------------------------------------------
def test_an_empty_study_has_a_report_that_says_so(
    empty_folder: StudyFolder, spec: StudySpec, provenance: Provenance
) -> None:
    write_report(empty_folder, spec, provenance=provenance)
    page = Page((empty_folder.report / "index.html").read_text(encoding="utf-8"))
    data = json.loads((empty_folder.report / "report.json").read_text(encoding="utf-8"))
    assert {c["verdict"] for c in data["claims"]} == {"NOT_ESTIMABLE"}
    assert data["claims"][0]["estimate"] is None
    assert data["analyses"]["missing"] == list(GROUPS)
    assert page.text.count("○ not estimable") >= 10
    assert "has not been computed" in page.text
    Page((empty_folder.report / "features.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "group", ["selection", *(pytest.param(name, marks=pytest.mark.slow) for name in ("behaviour", "intervention"))]
)
def test_one_missing_group_leaves_the_rest(
    group: str,
    written: StudyFolder,
    empty_folder: StudyFolder,
    spec: StudySpec,
    provenance: Provenance,
    without_figures: None,
) -> None:
    shutil.copytree(written.results, empty_folder.results, ignore=shutil.ignore_patterns(group))
    write_report(empty_folder, spec, provenance=provenance)
    text = Page((empty_folder.report / "index.html").read_text(encoding="utf-8")).text
    assert f"Not computed yet: {group}" in text
    assert "✓ supported" in text


def test_pooling_here_agrees_with_pooled_rows_in_the_mean(
    results: dict[str, xr.Dataset], behaviour_without_pooled: xr.Dataset, spec: StudySpec
) -> None:
    given = domain_accuracies(results, spec)
    pooled = domain_accuracies({"behaviour": behaviour_without_pooled}, spec)
    for a, b in zip(given, pooled, strict=True):
        assert (a.run, a.domain, a.n_prompts, a.gained, a.forgotten) == (
            b.run,
            b.domain,
            b.n_prompts,
            b.gained,
            b.forgotten,
        )
        assert b.accuracy == pytest.approx(a.accuracy)
    narrow, wide = pooled[1], behaviour_without_pooled.sel(model="base@0", task="parity")
    assert narrow.high - narrow.low < float(wide.accuracy_high - wide.accuracy_low)


# -- the same again, or not at all ---------------------------------------------------------------------------------
def test_the_same_study_gives_the_same_bytes(
    report: Path, written: StudyFolder, spec: StudySpec, provenance: Provenance, without_figures: None
) -> None:
    def content() -> dict[str, bytes]:
        return {str(p.relative_to(report)): p.read_bytes() for p in sorted(report.rglob("*")) if p.is_file()}

    before = content()
    write_report(written, spec, provenance=provenance)
    assert content() == before


def test_stores_that_list_variables_in_another_order_change_nothing(results: dict[str, xr.Dataset]) -> None:
    for group, data in results.items():
        names = [str(name) for name in data.data_vars]
        shuffled = data[list(reversed(names))]
        assert list(tidy({group: shuffled})[group].data_vars) == list(tidy({group: data})[group].data_vars)
        declared = [name for name in LAYOUTS[group].variables if name in names]
        assert list(tidy({group: shuffled})[group].data_vars)[: len(declared)] == declared


def test_a_failure_half_way_keeps_the_old_report(
    empty_folder: StudyFolder,
    spec: StudySpec,
    provenance: Provenance,
    monkeypatch: pytest.MonkeyPatch,
    without_figures: None,
) -> None:
    index = write_report(empty_folder, spec, provenance=provenance)
    before = index.read_bytes()

    def broken(*_: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("rlgen_stats.toolkit.reporting.report._write_data", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        write_report(empty_folder, spec, provenance=Provenance("another", "another"))
    assert index.read_bytes() == before
    assert (empty_folder.report / "report.json").exists()
    assert sorted(p.name for p in empty_folder.root.iterdir()) == ["report"]


@pytest.mark.filterwarnings("ignore:Object at p_value")
def test_a_damaged_results_group_is_an_error_not_a_gap(
    results: dict[str, xr.Dataset], empty_folder: StudyFolder, spec: StudySpec, provenance: Provenance
) -> None:
    write_results(empty_folder.results, "drift", results["drift"], provenance=provenance)
    marker = empty_folder.results / "drift" / "p_value" / "zarr.json"
    marker.unlink()
    with pytest.raises(StoreError, match=r"drift/seals.json .* the metadata of an array is gone"):
        write_report(empty_folder, spec, provenance=provenance)


def test_classes_and_matches_are_tables(results: dict[str, xr.Dataset]) -> None:
    classes = class_counts(results["latent_scaling"])
    assert classes.to_dict("list") == {
        "crosscoder": ["pair-sft", "pair-rl", "null"],
        "class": ["shared"] * 3,
        "view": [""] * 3,
        "n_features": [results["latent_scaling"].sizes["feature"]] * 3,
    }
    row = matching_summary(results["matching"]).iloc[0]
    assert row.n_matched == results["matching"].matched.sum()
    assert (row.subspace_overlap, row.subspace_overlap_chance) == (0.8, 0.3)


def test_features_that_differ_by_less_than_the_margin_are_counted_apart(results: dict[str, xr.Dataset]) -> None:
    drift = results["drift"]
    table = drift_summary(drift).set_index("model")
    for model in drift["model"].values:
        one = drift.sel(model=model)
        assert table.loc[model, "DRIFT"] == (one.call == "DRIFT").sum()
        assert table.loc[model, "below_margin"] == (one.flag == "below_margin").sum()
        assert table.loc[model, "typical_effect"] == one.typical_effect
    assert table["below_margin"].sum() > 0

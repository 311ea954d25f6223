"""The explorer: what it shows of a study, in this process, as a server, and in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.reporting.result_lookup import final_models
from tests.reporting.devtools import open_in_chromium
from tests.reporting.synthetic_study import HOSTILE, make_spec
from tests.reporting.test_browser import CHROMIUM, FLAGS

pytest.importorskip("bokeh", reason="the extra 'view' is not installed on this machine")

from bokeh.client import pull_session
from bokeh.document import Document

from rlgen_stats.toolkit.reporting.explorer import Explorer, ShownStudy, StudyReader


@pytest.fixture(scope="module")
def study(written: StudyFolder, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A copy of the synthetic study with a study.yaml and the completions of two arms, one of them hostile."""
    folder = StudyFolder(tmp_path_factory.mktemp("explored") / "study")
    shutil.copytree(written.root, folder.root)
    spec = make_spec()
    folder.spec.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    for model in (spec.base.path, *(path for run in spec.runs for path in run.checkpoints.values())):
        (folder.root / str(model)).mkdir(parents=True)
    arms = folder.root / "intervention" / "disable"
    arms.mkdir(parents=True)
    prompts = [f"parity-{i}" for i in range(4)]
    for condition, right in (("unedited", [True, True, False, False]), ("set", [True, False, True, False])):
        table = {"prompt": prompts, "sample": 0, "text": [HOSTILE] * 4, "correct": right, "format_class": "answer"}
        pd.DataFrame(table).to_parquet(arms / f"{condition}.parquet")
    return folder


class Open:
    """A page that is open in this process."""

    def __init__(self, reader: StudyReader, **asked: str) -> None:
        self._show(reader.read(), asked)

    @classmethod
    def of(cls, shown: ShownStudy, **asked: str) -> Open:
        page = cls.__new__(cls)
        page._show(shown, asked)
        return page

    def _show(self, shown: ShownStudy, asked: dict[str, str]) -> None:
        self.document = Document()
        self.explorer = Explorer(self.document, shown, asked)

    def __getitem__(self, name: str) -> Any:
        model = self.document.get_model_by_name(name)
        assert model is not None, name
        return model


@pytest.fixture(scope="module")
def reader(study: StudyFolder) -> StudyReader:
    return StudyReader(study, make_spec())


@pytest.fixture
def page(reader: StudyReader) -> Open:
    return Open(reader)


def test_behaviour_follows_the_model_and_the_task(page: Open) -> None:
    assert page["model"].value == "rl@80"
    assert re.findall(r'<th scope="row">(.*?)</th>', page["behaviour"].text)[:2] == ["addition", "parity"]
    page["task"].value = "parity"
    page["model"].value = "sft@30"
    text = page["behaviour"].text
    assert re.findall(r'<th scope="row">(.*?)</th>', text) == ["parity"]
    assert '<th scope="col" class="r">sft@30</th>' in text
    assert "activation shift <b>0.246</b>" in text, "0.55 (30 / 150) ** .5"


def test_features_follow_the_model(page: Open, results: dict[str, Any]) -> None:
    """The table and the scatter hold the numbers of drift, of any checkpoint."""
    for model in ("rl@80", "sft@60"):
        page["model"].value = model
        data = page["feature-table"].source.data
        drift = results["drift"].sel(model=model, feature=data["feature"])
        np.testing.assert_array_equal(data["effect_sd"], drift["effect_sd"].values)
        np.testing.assert_array_equal(data["d_z"], drift["d_z"].values)
        assert data["call"] == drift["call"].values.tolist()
        coloured = {colour for colour, call in zip(data["colour"], data["call"], strict=True) if call == "DRIFT"}
        assert coloured == {{"rl@80": "#1b6ca8", "sft@60": "#c4561b"}[model]}
        n = int((results["drift"].sel(model=model)["call"] == "DRIFT").sum())
        assert page["counts"].text.strip().startswith(f"<p>{n} of the 240 features")
    assert page["drift"].renderers[0].data_source is page["feature-table"].source


def test_a_picked_feature_is_shown(page: Open) -> None:
    """A row, or a dot of the same source, leads to its section; so does a number, which marks the row."""
    source = page["feature-table"].source
    row = source.data["feature"].index(88)
    source.selected.indices = [row]
    assert page["feature-number"].value == 88
    text = page["feature"].text
    for part in ('id="feature-88"', "in sft@150", "Change from base along the checkpoints", "Its match in the other"):
        assert part in text
    page["feature-number"].value = 7
    assert 'id="feature-7"' in page["feature"].text
    assert source.selected.indices == [source.data["feature"].index(7)]
    page["feature-number"].value = None
    assert 'id="feature-7"' in page["feature"].text


def test_the_search_keeps_rows_with_all_words(page: Open) -> None:
    source, rows = page["feature-table"].source, page["feature-table"].view.filter
    assert len(rows.indices) == 240
    page["search"].value = "Confirmed edited"
    assert [source.data["shown"][i] for i in rows.indices] == ["confirmed, edited"] * 5
    page["search"].value = "nowhere"
    assert rows.indices == []


def test_prompts_follow_task_and_outcome(page: Open, study: StudyFolder) -> None:
    """Planted: base is right on every third prompt, sft on every second, rl on all."""
    shown = page["prompt-table"].source
    prompts = pd.read_parquet(study.completions / "base@0.parquet")["prompt"].drop_duplicates().tolist()
    for model, outcome, kept in (
        ("rl@80", "gained", [p for i, p in enumerate(prompts) if i % 3]),
        ("rl@80", "lost", []),
        ("sft@150", "lost", [p for i, p in enumerate(prompts) if i % 3 == 0 and i % 2]),
        ("sft@150", "wrong in both", [p for i, p in enumerate(prompts) if i % 3 and i % 2]),
        ("sft@150", "right in both", [p for i, p in enumerate(prompts) if i % 6 == 0]),
        ("sft@150", "", prompts),
    ):
        page["model"].value, page["outcome"].value = model, outcome
        assert shown.data["prompt"] == kept
    page["outcome"].value, page["task"].value = "gained", "parity"
    assert shown.data["prompt"]
    assert set(shown.data["task"]) == {"parity"}
    assert f"{len(shown.data['prompt'])} prompts match" in page["summary"].text


def test_an_arm_is_held_against_the_unedited_model(page: Open) -> None:
    page["edit"].value = "disable/set"
    shown = page["prompt-table"].source
    assert (shown.data["before"], shown.data["after"]) == (["✓", "✓", "✕", "✕"], ["✓", "✕", "✓", "✕"])
    for outcome, prompt in (("lost", "parity-1"), ("gained", "parity-2")):
        page["outcome"].value = outcome
        assert shown.data["prompt"] == [prompt]
    assert "1 gained, 1 lost, 1 right in both, 1 wrong in both" in " ".join(page["summary"].text.split())
    shown.selected.indices = [0]
    text = page["prompt"].text
    assert 'id="prompt-parity-2"' in text
    for who in ("base@0", "sft@150", "rl@80", "disable: unedited", "disable: the set"):
        assert f"<dt>{who}</dt>" in text


@pytest.mark.slow
def test_another_dictionary_has_its_own_features_and_arms(
    reader: StudyReader, study: StudyFolder, tmp_path: Path
) -> None:
    folder = StudyFolder(shutil.copytree(study.root, tmp_path / "study"))
    shutil.copytree(folder.features, folder.features_of(2))
    arms = folder.root / "intervention" / "disable"
    in_second = folder.root / "intervention" / "dictionary-2" / "disable"
    in_second.mkdir(parents=True)
    pd.read_parquet(arms / "set.parquet").assign(correct=False).to_parquet(in_second / "set.parquet")
    first = reader.read()
    spec, results = first.spec, dict(first.results)
    primary = spec.primary_crosscoder.model_copy(update={"replicates": 2})
    crosscoders = tuple(primary if one is spec.primary_crosscoder else one for one in spec.crosscoders)
    drift, trial = results["drift"], results["intervention"].sel(direction=["disable"])
    results |= {"drift.2": drift.assign(effect_sd=drift["effect_sd"] + 1), "selection.2": results["selection"]}
    results |= {"trial-dictionary": trial, "trial-dictionary.2": trial, "trial-features-19-in-2": trial}
    spec = spec.model_copy(update={"crosscoders": crosscoders})
    both = replace(first, folder=folder, spec=spec, results=results)
    page = Open.of(both, edit="disable/set", feature="7")
    assert page["dictionary"].options == [("1", "1: main"), ("2", "2: main.2")]
    before = dict(page["feature-table"].source.data)
    assert page["prompt-table"].source.data["after"] == ["✓", "✕", "✓", "✕"]
    page["dictionary"].value = "2"
    after = page["feature-table"].source.data
    np.testing.assert_allclose(after["effect_sd"], before["effect_sd"] + 1)
    assert page["prompt-table"].source.data["before"] == ["✓", "✓", "✕", "✕"], "the unedited model is the same"
    assert page["prompt-table"].source.data["after"] == ["✕"] * 4
    assert {name.partition("/")[0] for name, _ in page["edit"].options} == {"", "disable"}
    assert page["feature-number"].value == after["feature"][0], "number 7 is another feature there"
    page["feature-number"].value = 7
    assert "intervene STUDY --features 7 --dictionary 2" in page["feature"].text
    other = Open.of(both, dictionary="2", edit="disable/set")
    assert other["prompt-table"].source.data["after"] == ["✕"] * 4
    assert Open(reader).document.get_model_by_name("dictionary") is None, "there is one"


def test_what_a_model_wrote_is_text(page: Open) -> None:
    page["edit"].value = "disable/set"
    page["prompt-table"].source.selected.indices = [0]
    page["feature-number"].value = 7
    for name in ("prompt", "feature"):
        assert "<script>" not in page[name].text
        assert "<b>so" not in page[name].text
        assert "<i>step" not in page[name].text
        assert page[name].disable_math, "$$ in a completion is no formula"
    assert "&lt;script&gt;alert" in page["prompt"].text
    assert "&lt;i&gt;step" in page["feature"].text


@pytest.mark.slow
def test_a_selection_has_an_address(page: Open, reader: StudyReader) -> None:
    page["model"].value, page["task"].value, page["outcome"].value = "sft@150", "parity", "gained"
    page["feature-number"].value = 19
    page["prompt-table"].source.selected.indices = [2]
    link = re.search(r'href="\?([^"]*)"', page["link"].text)
    assert link is not None
    asked = dict(part.split("=") for part in link[1].replace("&amp;", "&").replace("%40", "@").split("&"))
    other = Open(reader, **asked)
    for name in ("model", "task", "outcome", "feature-number"):
        assert other[name].value == page[name].value
    for name in ("behaviour", "feature", "prompt", "summary"):
        assert other[name].text == page[name].text


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [{"feature": "9" * 5000}, {"feature": "x", "task": "no", "prompt": "no", "model": ""}]
)
def test_an_address_of_something_else_shows_what_there_is(asked: dict[str, str], reader: StudyReader) -> None:
    page = Open(reader, **asked)
    assert page["feature-number"].value in (239, page["feature-table"].source.data["feature"][0])
    assert page["model"].value == "rl@80"
    assert 'id="prompt-' in page["prompt"].text


def test_missing_stages_are_said(empty_folder: StudyFolder) -> None:
    page = Open(StudyReader(empty_folder, make_spec()))
    said = page["behaviour"].text + page["counts"].text
    for sentence in ("behaviour has not been computed", "how far the models moved has not", "drift has not"):
        assert sentence in said
    assert page["prompt-table"].source.data["prompt"] == []
    assert "contexts" in page["feature"].text.lower()


@pytest.mark.slow
def test_new_results_are_read_and_old_ones_kept(study: StudyFolder, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    shutil.copytree(study.root, folder.root)
    reader = StudyReader(folder, make_spec())
    first = reader.read()
    assert reader.read() is first
    assert final_models(make_spec(), first.results.get("drift"))
    shutil.rmtree(folder.results / "drift")
    assert "drift" not in reader.read().results


# -- the server --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def served(study: StudyFolder) -> Iterator[str]:
    """Address of a server in a process of its own, which ends by Ctrl-C."""
    command = [sys.executable, "-P", "-m", "rlgen_stats.cli", "view", str(study.root), "--port", "0", "--no-browser"]
    environment = os.environ | {"BOKEH_RESOURCES": "cdn"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background lack
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, before)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), (line, server.communicate(timeout=120))
        yield line.split()[0]
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=120)
        assert server.returncode == 0
        assert "Traceback" not in said
    finally:
        server.kill()


def port_of(served: str) -> int:
    return int(served.rstrip("/").rpartition(":")[2])


def test_the_page_loads_its_scripts_from_its_own_server(served: str) -> None:
    """Although the environment of the server asks for the network's."""
    with urllib.request.urlopen(served, timeout=30) as answer:
        source = answer.read().decode()
    scripts = re.findall(r'<script[^>]*src="([^"]*)"', source)
    assert scripts
    assert all(script.startswith("/static/js/bokeh") for script in scripts)
    assert not re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?:https?:)?//', source)
    with urllib.request.urlopen(served + scripts[0].lstrip("/"), timeout=30) as answer:
        assert answer.status == 200


def test_it_listens_on_the_loopback_address_only(served: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port_of(served)), timeout=10)


def test_another_sites_name_shows_nothing(served: str) -> None:
    """A name that another site makes lead to this machine (DNS rebinding), and a socket that such a page opens."""
    request = urllib.request.Request(served, headers={"Host": "elsewhere.example"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert b"synthetic" not in answer.read()
    lines = ("GET /ws HTTP/1.1", f"Host: 127.0.0.1:{port_of(served)}", "Connection: Upgrade", "Upgrade: websocket")
    keys = ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Origin: http://a.example")
    with socket.create_connection(("127.0.0.1", port_of(served)), timeout=30) as one:
        one.sendall("\r\n".join((*lines, *keys, "", "")).encode())
        assert one.recv(12).decode() == "HTTP/1.1 403"


def test_a_client_changes_what_is_shown(served: str) -> None:
    with pull_session(url=served, arguments={"task": "parity"}) as session:
        document = session.document
        document.get_model_by_name("model").value = "sft@150"
        document.get_model_by_name("feature-number").value = 19
        session.pull()  # what the server made of it
        document = session.document
        assert 'id="feature-19"' in document.get_model_by_name("feature").text
        assert "sft@150" in document.get_model_by_name("behaviour").text


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed on this machine")
def test_in_a_browser_a_click_leads_to_a_feature(served: str, tmp_path: Path) -> None:
    """Rows and dots are drawn, a click shows the feature; nothing is run, nothing asked from elsewhere."""
    flags = (*FLAGS, "--window-size=1280,1000")
    with open_in_chromium(str(CHROMIUM), f"{served}?edit=disable/set", tmp_path / "profile", *flags) as page:
        page.wait_for("inside(document.body).some((one) => one.id === 'prompt-parity-0')")
        cell = "inside(document.body).filter((one) => one.classList.contains('slick-cell') && one.textContent === '88')"
        page.wait_for(f"{cell}.length")
        page.ask(f"{cell}[0].click()")
        page.wait_for("inside(document.body).some((one) => one.id === 'feature-88')")
        page.ask("Bokeh.documents[0].get_model_by_name('model').value = 'sft@30'")
        page.wait_for("inside(document.body).some((one) => one.tagName === 'TH' && one.textContent === 'sft@30')")
        assert HOSTILE in page.text()
        assert page.ask("inside(document.body).filter((one) => one.tagName === 'CANVAS').length > 0")
        assert page.ask("document.documentElement.scrollWidth") <= 1280
        page.send("Emulation.setDeviceMetricsOverride", width=375, height=812, deviceScaleFactor=1, mobile=True)
        page.wait_for("document.documentElement.scrollWidth === 375")
        told = [event["params"] for event in page.events if event["method"] == "Runtime.consoleAPICalled"]
        assert not [one for one in told if one["type"] in ("error", "warning", "assert")]
        bad = {"Runtime.exceptionThrown", "Page.javascriptDialogOpening"}
        assert not [event for event in page.events if event["method"] in bad]
        asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
        assert asked
        assert all(url.startswith((served, "data:")) for url in asked)


# -- the command -------------------------------------------------------------------------------------------------------
def refused(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["view", *map(str, arguments), "--no-browser"])
    assert done.exit_code == 2, done.output
    assert done.output.count("\n") == 1
    return done.output


def test_without_bokeh_one_sentence_says_how_to_install_it(study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert "pip install 'rlgen-stats[view]'" in refused(study.root)


def test_a_taken_port_and_no_study_are_one_sentence(study: StudyFolder, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in refused(study.root, "--port", port)
    assert "study.yaml" in refused(tmp_path)


@pytest.mark.slow
def test_results_of_another_study_file_are_refused(study: StudyFolder, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    shutil.copytree(study.root, folder.root)
    folder.stages.mkdir(exist_ok=True)
    (folder.stages / "drift.json").write_text('{"key": "of another study.yaml", "finished": true}')
    assert "the results of drift are of another study.yaml" in refused(folder.root)

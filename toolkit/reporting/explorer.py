"""The report's facts served live: a Bokeh page that follows a dictionary, a task, a checkpoint, an edit, an outcome.

Widgets, tables and the scatter of features are Bokeh's. Charts, features and prompts come from the functions and
templates of the report, so that both say the same.
"""

from __future__ import annotations

import html
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from urllib.parse import urlencode

import numpy as np
import pandas as pd
from bokeh.application import Application
from bokeh.application.handlers import FunctionHandler
from bokeh.document import Document
from bokeh.layouts import column
from bokeh.models import (
    CDSView,
    ColumnDataSource,
    DataTable,
    Div,
    IndexFilter,
    InlineStyleSheet,
    NumberFormatter,
    NumericInput,
    ScientificFormatter,
    Select,
    TableColumn,
    TextInput,
)
from bokeh.plotting import figure
from bokeh.server.server import Server
from bokeh.settings import settings
from matplotlib.axes import Axes

from rlgen_stats.schemas.dims import BASE_MODEL, split_model_id
from rlgen_stats.schemas.errors import InputError, RlgenStatsError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_features
from rlgen_stats.toolkit.reporting.arm_rows import Arm, arms_of, in_order
from rlgen_stats.toolkit.reporting.claims.assess import assess_claims
from rlgen_stats.toolkit.reporting.claims.claim import Claim
from rlgen_stats.toolkit.reporting.examples import prompt_texts, shortened
from rlgen_stats.toolkit.reporting.facts import StudyData, glance, read_study_data
from rlgen_stats.toolkit.reporting.feature_cards import feature_cards, tokens_of
from rlgen_stats.toolkit.reporting.feature_table import MAX_ROWS, FeatureTable, feature_table
from rlgen_stats.toolkit.reporting.figures.behaviour_and_drift import drift_height, plot_accuracy, plot_transitions
from rlgen_stats.toolkit.reporting.figures.figure_inputs import styles_of
from rlgen_stats.toolkit.reporting.figures.overview import plot_movement
from rlgen_stats.toolkit.reporting.figures.plotting import HALF, NULL, inlined, panel
from rlgen_stats.toolkit.reporting.formatting import DASH, p_text
from rlgen_stats.toolkit.reporting.headline import answer, domain_accuracies
from rlgen_stats.toolkit.reporting.population import populations
from rlgen_stats.toolkit.reporting.prompt_pages import ReplySource, arm_source, cards_of, model_source, reply_sources
from rlgen_stats.toolkit.reporting.report import environment, load_results
from rlgen_stats.toolkit.reporting.result_lookup import Results, labels_of, number
from rlgen_stats.toolkit.reporting.trial_rows import in_dictionary

ADDRESS: Final = "127.0.0.1"
"""The page is for people at this machine."""
OUTCOMES: Final = {
    "gained": (False, True),
    "lost": (True, False),
    "right in both": (True, True),
    "wrong in both": (False, False),
}
"""Outcome -> whether a prompt was right before and after."""
MAX_LETTERS: Final = 120
"""Longest piece of a prompt in the table of prompts; its section shows more."""
PROMOTED: Final = 4
"""Promoted tokens in the table of features."""
_BEHAVIOUR: Final = ("n_prompts", "accuracy", "difference", "difference_low", "difference_high", "gained", "forgotten")
_MOVEMENT: Final = ("activation_shift", "weight_distance", "kl_from_base")
_SIGNED: Final = partial(NumberFormatter, format="+0.00", nan_format=DASH)
_FEATURE_COLUMNS: Final = {
    "feature": ("Feature", 70, None),
    "shown": ("Shown", 130, None),
    "effect_sd": ("Change, sd of base", 120, _SIGNED),
    "q_value": ("q", 80, partial(ScientificFormatter, precision=1, nan_format=DASH)),
    "call": ("Call", 110, None),
    "verification": ("Verification effect", 120, _SIGNED),
    "promotes": ("Promotes", 260, None),
}
"""Column -> title, width in pixels, and how numbers are written."""
_TOOLTIPS: Final = [
    ("feature", "@feature"),
    ("change", "@effect_sd{+0.00} sd of base"),
    ("q", "@q"),
    ("promotes", "@promotes"),
]
_PROMPT_COLUMNS: Final = {
    "prompt": ("Prompt", 150, None),
    "task": ("Task", 110, None),
    "split": ("Split", 90, None),
    "before": ("Before", 60, None),
    "after": ("After", 60, None),
    "text": ("Text", 380, None),
}
_GREY: Final = "#7d8893"
"""Text and axes of the scatter, legible on light and dark pages."""


def study_server(folder: StudyFolder, spec: StudySpec, *, port: int) -> Server:
    """A Bokeh server of a study's explorer on 127.0.0.1, not yet started; ``port`` 0 is any free one.

    Raises
    ------
    StoreError
        If results cannot be read.
    InputError
        If the port is taken, or may not be used.
    """
    settings.resources = "server"  # scripts from this server, whatever the environment says: no network
    reader = StudyReader(folder, spec)
    reader.read()
    port = port or _free_port()
    hosts = [f"{name}:{port}" for name in (ADDRESS, "localhost")]

    def show(document: Document) -> None:
        request = document.session_context.request
        if request.headers.get("Host") not in hosts:  # another site's name that leads here
            document.add_root(Div(text=f"Expected a request to {hosts[0]}."))
            return
        asked = {name: values[0].decode("utf-8", "replace") for name, values in request.arguments.items() if values}
        try:
            Explorer(document, reader.read(), asked)
        except RlgenStatsError as error:  # a run may be replacing what is read
            document.add_root(Div(text=html.escape(str(error))))

    try:
        return Server(Application(FunctionHandler(show)), address=ADDRESS, port=port, allow_websocket_origin=hosts)
    except OSError as error:
        raise InputError(
            f"port {port} of {ADDRESS} cannot be used ({(error.strerror or 'refused').lower()}); name another with "
            "--port, or 0 for any that is free."
        ) from error


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((ADDRESS, 0))
        return int(one.getsockname()[1])


# -- what is shown -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class ShownStudy:
    """A study as it stands on disk."""

    folder: StudyFolder
    spec: StudySpec
    results: Results
    data: StudyData
    claims: tuple[Claim, ...]
    table: FeatureTable
    dictionary: int = 1
    """Number of the dictionary whose features, tests and arms are shown."""

    def in_dictionary(self, dictionary: int) -> ShownStudy:
        """The study with the features, tests and arms of one of its dictionaries."""
        if dictionary == 1:
            return self
        primary, features = self.spec.primary_crosscoder, self.folder.features_of(dictionary)
        one = primary.model_copy(update={"name": primary.names[dictionary - 1], "replicates": None})
        crosscoders = tuple(one if each is primary else each for each in self.spec.crosscoders)
        spec = self.spec.model_copy(update={"crosscoders": crosscoders})
        results = in_dictionary(self.results, dictionary)
        return replace(
            self,
            spec=spec,
            results=results,
            data=replace(self.data, features=open_features(features) if features.exists() else None),
            table=feature_table(results, spec),
            dictionary=dictionary,
        )

    @property
    def models(self) -> dict[str, list[str]]:
        """Run -> its checkpoints, of the first analysis that has any."""
        known: tuple[Any, ...] = (*(self.results.get(name) for name in ("behaviour", "drift", "movement")),)
        labels = next((found for one in (*known, self.data.features) if (found := labels_of(one, "model"))), [])
        runs: dict[str, list[str]] = {}
        for model in labels:
            if model != BASE_MODEL:
                runs.setdefault(split_model_id(model)[0], []).append(model)
        return runs

    @property
    def arms(self) -> dict[str, Arm]:
        """``direction/condition`` -> arms of the study's trial, in reading order."""
        trial = self.results.get("intervention")
        arms = [arm for d in labels_of(trial, "direction") if trial is not None for arm in in_order(arms_of(trial, d))]
        return {f"{arm.direction}/{arm.condition}": arm for arm in arms}


class StudyReader:
    """Reads a study, and its results only where these have changed."""

    def __init__(self, folder: StudyFolder, spec: StudySpec) -> None:
        self._folder, self._spec = folder, spec
        self._stamp: object = None
        self._shown: ShownStudy | None = None

    def read(self) -> ShownStudy:
        """The study as it stands now."""
        folder, spec = self._folder, self._spec
        stores = [folder.results, folder.features, folder.outcomes]
        inside = [path for store in stores if store.exists() for path in store.iterdir()]
        stamp = {path: path.stat().st_mtime_ns for path in inside}
        if self._shown is None or stamp != self._stamp:
            results = load_results(folder)
            self._shown = ShownStudy(
                folder=folder,
                spec=spec,
                results=results,
                data=read_study_data(folder, spec),
                claims=assess_claims(results, spec),
                table=feature_table(results, spec),
            )
            self._stamp = stamp
        return self._shown


# -- the page ----------------------------------------------------------------------------------------------------------
class Explorer:
    """One open page: widgets, and what they select."""

    def __init__(self, document: Document, shown: ShownStudy, asked: Mapping[str, str]) -> None:
        self._study, self._shown, self._asked = shown, shown, asked
        self._templates = environment()
        self._parts: Any
        self._section: Any
        self._parts, self._section = (
            self._templates.get_template(f"{name}.html.j2").module for name in ("explorer_parts", "feature_section")
        )
        self._common = {
            "stylesheets": [InlineStyleSheet(css=self._templates.get_template("explorer.css").render())],
            "sizing_mode": "stretch_width",
        }
        self._choices()
        names = ("link", "behaviour", "counts", "feature", "summary", "prompt")
        self._panels = {name: Div(name=name, disable_math=True, **self._common) for name in names}
        self._features, self._prompts = ColumnDataSource(name="features"), ColumnDataSource(name="prompts")
        self._rows = IndexFilter()
        self._texts, self._prompt = prompt_texts(shown.folder, shown.spec), asked.get("prompt", "")
        self._model_changed()
        self._filter_features()
        self._show_feature()
        self._connect()
        self._put_into(document)

    # widgets
    def _choices(self) -> None:
        shown, rl = self._shown, self._shown.spec.contrasted[1].name
        tasks = [] if shown.data.prompts is None else list(dict.fromkeys(shown.data.prompts["task"]))
        models = [(model, model.replace("@", " at step ")) for run in shown.models.values() for model in run]
        names = shown.spec.primary_crosscoder.names
        numbers = [(str(number), f"{number}: {name}") for number, name in enumerate(names, start=1)]
        self._dictionary = self._select("dictionary", "Dictionary of features and edits", numbers)
        self._read_dictionary()
        self._task = self._select("task", "Task", [("", "all tasks"), *((task, task) for task in tasks)])
        final = shown.models.get(rl, [""])[-1]
        self._model = self._select("model", "Model and checkpoint", models or [("", "none yet")], final)
        self._edit = self._select("edit", "Edited", self._edits())
        self._outcome = self._select("outcome", "Outcome", [("", "any"), *((name, name) for name in OUTCOMES)])
        last, asked = shown.spec.primary_crosscoder.n_features - 1, self._asked.get("feature", "")
        self._number = NumericInput(
            name="feature-number",
            title=f"Feature, 0 to {last}",
            value=min(int(asked[:9]), last) if asked.isascii() and asked.isdigit() else self._first,
            low=0,
            high=last,
            **self._common,
        )
        self._search = TextInput(name="search", title="Search features", **self._common)

    def _edits(self) -> list[tuple[str, str]]:
        arms = self._shown.arms.items()
        return [("", "no: greedy answers"), *((name, f"{arm.direction}: {arm.label}") for name, arm in arms)]

    def _read_dictionary(self) -> None:
        self._shown = self._study.in_dictionary(int(self._dictionary.value))
        self._said = populations(self._shown.results, self._shown.spec, self._shown.data.prompts)
        self._columns = self._feature_columns()

    @property
    def _first(self) -> int:
        """The feature at the top of the table."""
        return next(iter(self._columns["feature"]), 0)

    def _select(self, name: str, title: str, options: list[tuple[str, str]], default: str = "") -> Select:
        values = [value for value, _ in options]
        value = next((one for one in (self._asked.get(name), default) if one in values), values[0])
        return Select(name=name, title=title, options=options, value=value, **self._common)

    def _connect(self) -> None:
        def on(model: Any, then: Callable[[], None], name: str = "value") -> None:
            model.on_change(name, lambda attr, old, new: then())  # Bokeh wants these three

        on(self._dictionary, self._dictionary_changed)
        on(self._task, self._task_changed)
        on(self._model, self._model_changed)
        on(self._edit, self._list_prompts)
        on(self._outcome, self._list_prompts)
        on(self._search, self._filter_features)
        on(self._number, self._show_feature)
        on(self._features.selected, self._feature_picked, "indices")
        on(self._prompts.selected, self._prompt_picked, "indices")

    def _dictionary_changed(self) -> None:
        """Another dictionary's features, which share nothing but their numbers; an edit that it has too stays."""
        self._read_dictionary()
        edits = self._edits()
        self._edit.update(options=edits, value=self._edit.value if self._edit.value in dict(edits) else "")
        self._list_prompts()
        self._list_features()
        self._filter_features()
        self._number.value = self._first
        self._show_feature()

    def _task_changed(self) -> None:
        self._show_behaviour()
        self._list_prompts()

    def _model_changed(self) -> None:
        self._task_changed()
        self._list_features()

    def _feature_picked(self) -> None:
        if self._features.selected.indices:
            self._number.value = int(self._features.data["feature"][self._features.selected.indices[0]])

    def _prompt_picked(self) -> None:
        if self._prompts.selected.indices:
            self._prompt = str(self._prompts.data["prompt"][self._prompts.selected.indices[0]])
            self._show_prompt()

    def _link(self, **changes: object) -> str:
        """Address of this page as it is, or with another feature or prompt."""
        state = {name: getattr(self, f"_{name}").value for name in ("dictionary", "task", "model", "edit", "outcome")}
        state |= {"feature": self._number.value, "prompt": self._prompt} | changes
        return "?" + urlencode({name: value for name, value in state.items() if value not in ("", None)})

    # behaviour and movement
    def _show_behaviour(self) -> None:
        shown, model, task = self._shown, self._model.value, self._task.value
        behaviour, movement = shown.results.get("behaviour"), shown.results.get("movement")
        runs = [run.name for run in shown.spec.contrasted]
        figures: list[str] = []
        rows: list[dict[str, Any]] = []
        moved: dict[str, Any] = {}
        if model in labels_of(behaviour, "model") and behaviour is not None:
            data = behaviour.sel(task=[task]) if task in labels_of(behaviour, "task") else behaviour
            rows = [
                {"task": name, "base": number(data, "accuracy", model=BASE_MODEL, task=name)}
                | {which: number(data, which, model=model, task=name) for which in _BEHAVIOUR}
                for name in labels_of(data, "task")
            ]
            height = 1.3 + 0.4 * data.sizes["task"]
            figures = [
                _drawn("accuracy", partial(plot_accuracy, data, models=[BASE_MODEL, model], runs=runs), height),
                _drawn("transitions", partial(plot_transitions, data, model=model), height),
            ]
        if model in labels_of(movement, "model") and movement is not None:
            moved = {name: number(movement, name, model=model) for name in _MOVEMENT}
            moved["figure"] = _drawn("movement", partial(plot_movement, movement), 2.4)
        unit = "" if behaviour is None else str(behaviour.attrs.get("unit", "prompt"))
        self._panels["behaviour"].text = str(self._parts.behaviour(model, unit, rows, figures, moved, self._said))

    # features
    def _feature_columns(self) -> dict[str, Any]:
        """What the table of features says of every model alike."""
        rows = self._shown.table.rows
        ids = [int(row["feature"]) for row in rows]
        tokens = tokens_of(self._shown.folder, self._shown.spec, ids, sign=1)
        promoted = [next(iter(tokens.get(k, {}).values()), [])[:PROMOTED] for k in ids]
        return {
            "feature": ids,
            "shown": [row.get("shown", "") + (", edited" if row.get("selected") else "") for row in rows],
            "verification": [float(row.get("verification_effect", np.nan)) for row in rows],
            "promotes": [" · ".join(words) for words in promoted],
        }

    def _list_features(self) -> None:
        columns, drift, model = dict(self._columns), self._shown.results.get("drift"), self._model.value
        ids = columns["feature"]
        columns |= {name: np.full(len(ids), np.nan) for name in ("effect_sd", "d_z", "q_value", "height")}
        columns |= {"call": [""] * len(ids), "colour": [NULL] * len(ids), "q": [DASH] * len(ids)}
        if drift is not None and model in labels_of(drift, "model"):
            one = drift[["effect_sd", "d_z", "q_value", "p_value", "call"]].sel(model=model).reindex(feature=ids)
            columns |= {name: one[name].values for name in ("effect_sd", "d_z", "q_value")}
            columns["height"] = drift_height(one["p_value"].values)
            columns["q"] = [p_text(q) for q in one["q_value"].values]
            columns["call"] = [str(call) for call in one["call"].values]
            colour = styles_of(drift, [run.name for run in self._shown.spec.contrasted]).get(split_model_id(model)[0])
            columns["colour"] = [colour[0] if colour and call == "DRIFT" else NULL for call in columns["call"]]
        self._features.data = columns
        self._panels["counts"].text = str(
            self._parts.counts(model, columns["call"], self._shown.table, drift is not None, self._said)
        )

    def _filter_features(self) -> None:
        words = self._search.value.lower().split()
        columns = self._columns
        texts = [
            f"{k} {shown} {promotes}".lower()
            for k, shown, promotes in zip(columns["feature"], columns["shown"], columns["promotes"], strict=True)
        ]
        self._rows.indices = [i for i, text in enumerate(texts) if all(word in text for word in words)]

    def _show_feature(self) -> None:
        shown, feature = self._shown, self._number.value
        if feature is None:  # while another number is typed
            return
        ids = self._columns["feature"]
        self._features.selected.indices = [ids.index(feature)] if feature in ids else []
        try:
            cards = feature_cards(shown.folder, shown.spec, shown.results, shown.data, [feature])
            prompts = {one.prompt for card in cards for group in card.contexts.values() for one in group}
            links = {prompt: self._link(prompt=prompt) + "#prompts" for prompt in prompts}
            self._panels["feature"].text = str(self._section.feature(cards[0], links, shown.dictionary))
        except RlgenStatsError as error:
            self._panels["feature"].text = str(self._parts.absent(str(error)))
        self._address()

    # prompts
    def _before_and_after(self) -> tuple[ReplySource, ReplySource]:
        """Base and the chosen model; or, of an edit, its direction's unedited arm and its own."""
        folder, arm = self._shown.folder, self._shown.arms.get(self._edit.value)
        if arm is None:
            return model_source(folder, BASE_MODEL), model_source(folder, self._model.value)
        unedited, dictionary = replace(arm, condition="unedited", kind="unedited"), self._shown.dictionary
        return arm_source(folder, unedited), arm_source(folder, arm, dictionary)

    def _list_prompts(self) -> None:
        table = self._shown.data.prompts
        table = pd.DataFrame(columns=["prompt", "task", "split"]) if table is None else table
        table = table[["prompt", "task", "split"]].set_index("prompt")
        sources = self._before_and_after()
        for name, source in zip(("before", "after"), sources, strict=True):
            table[name] = source.read("correct")["correct"].reindex(table.index)
        if self._task.value:
            table = table[table["task"] == self._task.value]
        answered = table.dropna()
        groups = {
            name: answered[(answered["before"] == before) & (answered["after"] == after)]
            for name, (before, after) in OUTCOMES.items()
        }
        counts = {name: len(group) for name, group in groups.items()}
        kept = groups.get(self._outcome.value, answered if self._edit.value else table)
        said = kept.head(MAX_ROWS).reset_index()
        for name in ("before", "after"):
            said[name] = said[name].map({True: "✓", False: "✕"}).fillna("—")
        said["text"] = [shortened(self._texts.get(prompt, ("", ""))[0], MAX_LETTERS) for prompt in said["prompt"]]
        self._prompts.selected.indices = []
        self._prompts.data = {str(name): said[name].tolist() for name in said}
        if self._prompt not in table.index:
            self._prompt = next(iter(said["prompt"]), "")
        names, greedy = [source.who for source in sources], sources[0].greedy
        self._panels["summary"].text = str(self._parts.outcomes(names, greedy, counts, len(kept), len(said)))
        self._show_prompt()

    def _show_prompt(self) -> None:
        shown = self._shown
        sources = reply_sources(shown.folder, shown.spec, shown.results, dictionary=shown.dictionary)
        sources += [one for one in self._before_and_after() if one not in sources]
        cards = []
        if shown.data.prompts is not None and self._prompt in set(shown.data.prompts["prompt"]):
            cards = cards_of(shown.folder, shown.spec, shown.data.prompts, [self._prompt], sources)
        self._panels["prompt"].text = str(self._parts.prompt(cards))
        self._address()

    def _address(self) -> None:
        self._panels["link"].text = str(self._parts.link(self._link()))

    # the whole
    def _put_into(self, document: Document) -> None:
        shown, results, spec = self._study, self._study.results, self._study.spec
        document.title = f"{spec.name}: explorer"
        document.template = self._templates.get_template("explorer.html.j2")
        document.template_variables.update(
            spec=spec,
            answer=answer(domain_accuracies(results, spec), shown.claims, results, spec),
            claims=shown.claims,
            glance=glance(shown.data, results, spec),
            folder=str(shown.folder.root),
        )
        choices = [
            *([self._dictionary] if len(self._dictionary.options) > 1 else []),
            self._task,
            self._model,
            self._edit,
            self._outcome,
            self._number,
            self._search,
        ]
        document.add_root(column(*choices, self._panels["link"], name="choices", sizing_mode="stretch_width"))
        document.add_root(self._scatter())
        document.add_root(self._table("feature-table", self._features, _FEATURE_COLUMNS, CDSView(filter=self._rows)))
        document.add_root(self._table("prompt-table", self._prompts, _PROMPT_COLUMNS, CDSView()))
        for name in ("behaviour", "counts", "feature", "summary", "prompt"):
            document.add_root(self._panels[name])

    def _scatter(self) -> Any:
        scatter = figure(
            name="drift",
            height=340,
            sizing_mode="stretch_width",
            tools="pan,wheel_zoom,box_zoom,tap,reset",
            tooltips=_TOOLTIPS,
            x_axis_label="standardised effect d_z",
            y_axis_label="−log₁₀ p",
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
        )
        scatter.toolbar.logo = None
        scatter.scatter(
            "d_z", "height", source=self._features, color="colour", size=7, alpha=0.75, nonselection_alpha=0.4
        )
        scatter.axis.axis_label_text_color = scatter.axis.major_label_text_color = _GREY
        scatter.axis.axis_line_color = scatter.axis.major_tick_line_color = _GREY
        scatter.axis.minor_tick_line_color = None
        scatter.grid.grid_line_color = _GREY
        scatter.grid.grid_line_alpha = 0.25
        return scatter

    def _table(self, name: str, source: ColumnDataSource, columns: Mapping[str, Any], view: CDSView) -> DataTable:
        shown = [
            TableColumn(field=field, title=title, width=width, **({} if written is None else {"formatter": written()}))
            for field, (title, width, written) in columns.items()
        ]
        return DataTable(
            name=name,
            source=source,
            view=view,
            columns=shown,
            index_position=None,
            reorderable=False,
            autosize_mode="none",
            height=330,
            **self._common,
        )


def _drawn(name: str, draw: Callable[[Axes], Axes], height: float) -> str:
    return inlined(panel(draw, HALF, height, title=name, alt=name).svg, f"explorer-{name}")

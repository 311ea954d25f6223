"""What commands print with ``--json``: one document, of the type that :data:`OUTPUTS` names for the command.

``rlgen-stats schema output`` prints all of it as a JSON Schema. NaN and infinity are null. A later release may add
keys; those that are here stay what they are.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter


class Output(BaseModel):
    """A JSON object with these keys and no others."""

    model_config = ConfigDict(extra="forbid")


# -- stages


class Verdict(Output):
    """The answer to one claim."""

    id: str
    """C1 to C5."""
    statement: str
    verdict: str
    answer: str


class StageResult(Output):
    """What one stage found."""

    stage: str
    state: Literal["done", "stale", "running", "interrupted", "foreign", "waiting"]
    seconds: float | None
    """Wall time of all its runs together."""
    facts: dict[str, JsonValue]
    """Its main numbers, by name; which ones depends on the stage."""
    stores: list[str]
    """What it wrote, below the study's folder; ``rlgen-stats inspect STUDY STORE`` describes one."""
    report: str | None = None
    """The page, of stage report."""
    verdicts: list[Verdict] = []
    """Of stage report."""


class StageState(Output):
    """Where one stage stands."""

    name: str
    state: Literal["done", "stale", "running", "interrupted", "foreign", "waiting"]
    key: str
    """Hash of everything the stage depends on."""
    seconds: float | None


class StageOutput(Output):
    """Of a stage; of ``run`` and ``demo`` the last stage asked for."""

    result: StageResult
    linked: dict[str, StageResult]
    """The same of further layers and contrasts, by their folder below the study's."""
    study: str
    study_id: str
    plan: list[StageState]
    """All stages, in running order."""


class RenderedPrompt(Output):
    """A task's first prompt as models read it."""

    models: list[str]
    task: str
    prompt: str
    text: str
    n_tokens: int


class StatusOutput(Output):
    """Of ``status``."""

    study: str
    study_id: str
    stages: list[StageState]
    linked: dict[str, list[StageState]] = {}
    rendered_prompts: list[RenderedPrompt]


# -- before a run


class Problem(Output):
    """One thing to change."""

    where: str
    message: str


class Costs(Output):
    """At most: every completion as long as its limit."""

    completions: int
    tokens: int
    prompt_tokens: int
    """Of the prompts before these completions."""
    trial_completions: int
    trial_tokens: int
    trial_prompt_tokens: int
    stores: dict[str, int]
    """Bytes, before compression."""


class ClaimPower(Output):
    """How often a study of this size gives the right verdict where something is true."""

    claim: str
    truth: str
    verdict: str
    power: float


class CheckOutput(Output):
    """Of ``check``; null where a problem hides a number."""

    problems: list[Problem]
    models: list[str]
    imported: list[str]
    n_prompts: dict[str, int]
    examples: list[RenderedPrompt]
    n_blocks: int | None
    width: int | None
    costs: Costs | None
    bytes_left: int | None
    bytes_free: int | None
    hours: float | None
    trial_hours: float | None
    claim_power: list[ClaimPower] | None
    """With ``--simulate``."""


class FileOutput(Output):
    """Of ``init``."""

    file: str
    """What was written."""


class FilesOutput(Output):
    """Of ``export-crosscoder`` and ``export-features``."""

    files: list[str]
    """What was written: weights files, folders of an SAE a view, tables."""


class CommitOutput(Output):
    """Of ``push-crosscoder``."""

    commit: str
    """Address of the commit."""


class AddedTask(Output):
    """Of ``tasks add``, one a task."""

    name: str
    file: str
    n_prompts: int
    settings: dict[str, JsonValue]


# -- trials of other sets


class TrialVerdict(Output):
    """Of one direction."""

    verdict: str
    effect: float | None
    rank_p: float | None
    reasons: list[str]
    replication: str


class TrialOutput(Output):
    """Of ``intervene`` with options: a trial, or with ``--dry-run`` what it would take."""

    name: str
    features: list[int] | None
    """Null where they are not selected yet."""
    prompts: int | None
    samples: int
    controls: int
    arms: dict[str, int]
    stored: dict[str, int]
    """Arms that are there already."""
    completions: int
    seconds: float | None
    why_not: str
    cannot_show: list[str]
    waiting_for: list[str] = []
    """Stages that a trial needs and that have not run."""
    results: str | None = None
    verdicts: dict[str, TrialVerdict] = {}


# -- analyses without a study


class FeatureCard(BaseModel):
    """Of ``features``, one a feature; the report's further facts about it are here too."""

    model_config = ConfigDict(extra="allow")

    feature: int
    origin: list[str]
    means: dict[str, float | None]
    contexts: dict[str, list[JsonValue]]
    tokens: dict[str, list[str]]


class Variable(Output):
    """A labelled array."""

    dims: list[str]
    attrs: dict[str, JsonValue]
    data: JsonValue
    """Nested lists, in the order of dims."""


class Comparison(BaseModel):
    """Of ``compare-outcomes``: dataset ``comparison`` (``rlgen-stats schema comparison``), one key a variable."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Variable]

    attrs: dict[str, JsonValue]


class SimulateOutput(Output):
    """Of ``simulate``."""

    features: str
    outcomes: str
    results: str
    n_models: int
    n_resumed: int
    simulation: dict[str, JsonValue]
    """Every setting."""
    planted: dict[str, int]
    """Kind of change -> features."""


class PowerOutput(Output):
    """Of ``power``; keys of ``drift`` and ``simulated`` say how errors are controlled: fdr, fwer, none."""

    design: dict[str, JsonValue]
    power_wanted: float
    run_sd: float
    drift: dict[str, dict[str, JsonValue]]
    simulated: dict[str, dict[str, JsonValue]]
    arms: list[dict[str, JsonValue]]


# -- stores


class StoreFacts(Output):
    """Of ``inspect``, by store or ``results.zarr/ANALYSIS``; what does not apply is left out."""

    bytes: int
    files: int
    uncompressed_bytes: int | None = None
    compression: float | None = None
    models: list[dict[str, JsonValue]] = []
    tokens: int | None = None
    shard_tokens: int | None = None
    segments: dict[str, int] = {}
    prompts: dict[str, JsonValue] = {}
    dimensions: dict[str, int] = {}
    arrays: dict[str, dict[str, JsonValue]] = {}
    summary: dict[str, JsonValue] = {}
    """Of an analysis: variable -> how often each of its values occurs, or least, mean, largest and missing."""
    written_by: dict[str, JsonValue] = {}
    schema_version: JsonValue = None
    study_id: str | None = None
    spec_hash: str | None = None
    text_mode: str | None = None
    readout: str | None = None
    scale: str | None = None
    test: str | None = None
    null: str | None = None
    unit: str | None = None
    family: str | None = None
    family_size: JsonValue = None
    seed: JsonValue = None


class VerifyOutput(Output):
    """Of ``verify``."""

    path: str
    n_arrays: int
    n_chunks: int
    problems: list[str]
    notes: list[str]
    ok: bool


class Migrated(Output):
    """Of ``migrate``, by store: versions of its layout."""

    before: JsonValue
    now: JsonValue


# -- in and out


class ImportOutput(Output):
    """Of ``import``."""

    store: str
    model: str
    site: str
    n_tokens: int
    n_resumed: int
    n_prompts: int
    width: int
    dtype: str
    format: str
    n_files: int


class ExportOutput(Output):
    """Of ``export``."""

    folder: str
    models: list[str]
    site: str
    n_tokens: int
    files: list[str]


class RequestsOutput(Output):
    """Of ``export-requests``, one a file."""

    file: str
    n_requests: int
    model: str
    checkpoint: str


class OutcomesOutput(Output):
    """Of ``import-outcomes``."""

    model: str
    file: str
    origin: dict[str, JsonValue]
    n_prompts: int
    n_samples: int
    n_truncated: int
    changed: bool
    missing: list[str]


class CrosscoderOutput(BaseModel):
    """Of ``import-crosscoder`` and ``pull-crosscoder``: spec.json of what was written, and where."""

    model_config = ConfigDict(extra="allow")

    folder: str
    name: str
    views: list[str]
    n_features: int
    widths: list[int]
    sparsity: str


_STAGES: Final = (
    "demo",
    "run",
    "posttrain",
    "outcomes",
    "extract",
    "crosscoder",
    "encode",
    "movement",
    "align",
    "drift",
    "stabilize",
    "significance",
    "select",
    "separation",
    "tokens",
    "replicability",
    "report",
)

OUTPUTS: Final[dict[str, Any]] = dict.fromkeys(_STAGES, StageOutput) | {
    "intervene": StageOutput | TrialOutput | list[TrialOutput],
    "init": FileOutput,
    "tasks": dict[str, dict[str, JsonValue]],
    "tasks add": list[AddedTask],
    "check": CheckOutput,
    "status": StatusOutput,
    "features": list[FeatureCard],
    "compare-outcomes": Comparison,
    "simulate": SimulateOutput,
    "power": PowerOutput,
    "inspect": dict[str, StoreFacts],
    "verify": VerifyOutput,
    "migrate": dict[str, Migrated],
    "import": ImportOutput,
    "export": ExportOutput,
    "export-requests": list[RequestsOutput],
    "import-outcomes": OutcomesOutput,
    "import-crosscoder": CrosscoderOutput,
    "export-crosscoder": FilesOutput,
    "export-features": FilesOutput,
    "push-crosscoder": CommitOutput,
    "pull-crosscoder": CrosscoderOutput,
}
"""Command -> type of what it prints."""


def output_document() -> dict[str, Any]:
    """JSON Schema of every command's output: ``commands`` (command -> schema) and the definitions they refer to."""
    adapters = [(name, "serialization", TypeAdapter(kind)) for name, kind in OUTPUTS.items()]
    of_command, document = TypeAdapter.json_schemas(adapters)  # type: ignore[arg-type]
    return {"commands": {name: of_command[name, "serialization"] for name in OUTPUTS}} | document

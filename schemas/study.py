"""The study file: what is compared, on which prompts, and with which settings.

``study.yaml`` is the only configuration. Unknown keys are refused with the nearest valid one
suggested; every field says what it is for in the string below it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import product
from typing import Annotated, Any, Final, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_serializer, model_validator

from rlgen_stats.schemas.dims import BASE_MODEL, check_name, model_id, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.null_views import BASE_VIEWS, is_reserved
from rlgen_stats.schemas.spec import PositiveInt, Spec
from rlgen_stats.schemas.tasks import GRADER_VERSIONS, GRADING_VERSION, GraderSpec, TaskSpec

STUDY_SCHEMA_VERSION: Final = 1

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
_LAST_STEP: Final = 2**63 - 1
"""Steps are stored as 64-bit integers."""
Dose = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_OrText: Final = WithJsonSchema(
    {"anyOf": [{"type": "object", "additionalProperties": {"type": "string"}}, {"type": "string"}]}
)
_OrNumber: Final = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {
                "type": "object",
                "properties": {
                    "final": {"type": "integer", "minimum": 1},
                    "others": {"type": "integer", "minimum": 0},
                },
                "required": ["final"],
                "additionalProperties": False,
            },
        ]
    }
)
_OrDepth: Final = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            {"const": "middle"},
        ]
    }
)
"""What a study file may say instead; it is written out when the file is read, where the folders are known."""
Readout = Literal["swap", "own", "joint", "fit"]
"""How one model's features are read from the shared code: its activation in every slot (swap), in its own slot with the
others at their means (own), the joint code of all views, whose contribution counts the view's decoder norm only
(joint), or one linear map for all models, fitted to the joint code (fit)."""


def _unless_default(default: Any) -> Any:
    """A field that the keys of stages, and with them finished studies, do not know while it has its default."""
    return Field(default, exclude_if=lambda value: value == default)


class ChatSpec(Spec):
    """How a model reads prompts: as plain text, or as a user's message that a chat template renders."""

    chat_template: str = _unless_default("none")
    """none: prompts are plain text; checkpoint: rendered by the chat template of the checkpoint's tokenizer; or a Jinja
    file with a template, relative to the study folder."""
    system: str | None = _unless_default(None)
    """System message before the prompt; messages that have one of their own keep it."""
    chat_template_kwargs: dict[str, Any] = _unless_default({})
    """Arguments of the template by its own names, e.g. {enable_thinking: false}."""

    @model_validator(mode="after")
    def _rendered_by_something(self) -> ChatSpec:
        if not self.rendered and (self.system is not None or self.chat_template_kwargs):
            raise ValueError(
                "'system' and 'chat_template_kwargs' need a chat template: add chat_template: checkpoint, or a file."
            )
        return self

    @property
    def rendered(self) -> bool:
        """Whether a chat template renders prompts."""
        return self.chat_template != "none"

    @property
    def template_file(self) -> str | None:
        """File of the template, where it is not the checkpoint's."""
        return None if self.chat_template in ("none", "checkpoint") else self.chat_template

    @property
    def chat(self) -> ChatSpec:
        """These fields alone."""
        return ChatSpec(**{name: getattr(self, name) for name in ChatSpec.model_fields})


class BaseSpec(ChatSpec):
    """The model every run starts from."""

    path: str
    """Folder of a Hugging Face checkpoint, absolute or relative to the study folder, or a model of the Hub:
    hf://OWNER/NAME, with @REVISION and /SUBFOLDER where needed."""


class ModelsSpec(Spec):
    """How every model of the study is loaded; one way for all, or their differences would be those of loading."""

    dtype: Literal["float32", "auto", "bfloat16", "float16"] = "float32"
    """Type of the weights and of the forward pass; auto: the type base's checkpoint is stored in, for every model.
    Activations, features, losses and divergences are summed in float32 or float64 whatever it is."""
    device_map: str | dict[str, int | str] | None = None
    """How layers are spread over devices, in accelerate's terms: auto, balanced, sequential, or module -> device.
    Default: all on 'device'. No layer may be offloaded to the CPU or the disk."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2 and so on; default: the one transformers chooses."""


class DataSpec(Spec):
    """Tables of prompts: parquet, csv, tsv, jsonl, json, arrow, or a folder that datasets saved, relative to the study
    folder; or on the Hub, hf://datasets/OWNER/NAME[@REVISION]/PATH.
    """

    prompts: str | None = "data/prompts.parquet"
    """Evaluation prompts: prompt_id, text, answer, task, domain (in|out); optional split, cluster and choices. Default:
    none where every task has a file of its own."""
    train: str | None = "data/train.parquet"
    """Training prompts: text, answer, and for SFT the teacher's completion; optional task and choices, by which GRPO
    grades where tasks are listed."""


FLOOR_ARM: Final = "floor"
"""Arm of runs that nothing is claimed of: how specific features of base look once it has moved without being taught."""


class RunSpec(ChatSpec):
    """One post-training run from the base. One that is trained here reads its training prompts by its chat template."""

    name: str
    """Name of the run; its checkpoints are ``name@step``."""
    arm: str
    """Kind of post-training this run is a replicate of, e.g. sft or rl. Runs of arm floor are not contrasted: their
    crosscoders with base are null floors of claim C1."""
    method: Literal["sft", "grpo", "pretrain", "checkpoints"] = "checkpoints"
    """Train here with TRL (sft, grpo; pretrain: language-model loss on the texts of data.train alone, without answer or
    completion) or use checkpoints made elsewhere."""
    seed: int = 0
    """Replicate number; combined with the study's seed."""
    n_checkpoints: PositiveInt = 5
    """Checkpoints kept while training here."""
    schedule: Literal["linear", "geometric"] = "linear"
    """Steps of these checkpoints: evenly spaced (linear), or from the first step on each the same multiple of the one
    before (geometric; fewer where steps coincide), so that a run that moves fast has checkpoints near to base too."""
    checkpoints: Annotated[dict[int, str], _OrText] = Field(default_factory=dict)
    """step -> folder or model of the Hub (as base.path), for method 'checkpoints'; or a pattern of folders, in which *
    stands for one number, the step: runs/rl/global_step_*/hf, or hf://OWNER/NAME/step-*."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Arguments of TRL's SFTConfig or GRPOConfig, by their own names."""

    @property
    def is_floor(self) -> bool:
        """Whether it is a null floor and no run that is compared."""
        return self.arm == FLOOR_ARM

    @model_validator(mode="after")
    def _check(self) -> RunSpec:
        check_name(self.name, "a run name")
        if is_reserved(self.name):
            raise ValueError(f"a run cannot be called {self.name!r}; that name is the base model's.")
        if (self.method == "checkpoints") != bool(self.checkpoints):
            raise ValueError(
                f"run {self.name!r}: method 'checkpoints' needs a 'checkpoints' mapping of step to folder, "
                "and the training methods take none."
            )
        if any(step < 1 for step in self.checkpoints):
            raise ValueError(f"run {self.name!r}: checkpoint steps start at 1; step 0 is the base.")
        if any(step > _LAST_STEP for step in self.checkpoints):
            raise ValueError(f"run {self.name!r}: checkpoint steps end at {_LAST_STEP}, got {max(self.checkpoints)}.")
        return self


class SampleNumbers(Spec):
    """How many completions are sampled of models that differ in their place in a run."""

    final: PositiveInt
    """Sampled completions per prompt of base and of every run's last checkpoint."""
    others: Annotated[int, Field(ge=0)] = 0
    """Of the checkpoints before; with 0 these have their greedy completion alone."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"final": value, "others": value}
        if not isinstance(value, dict | cls):
            raise ValueError(f"must be a number, or a choice such as {{final: 4, others: 0}}; got {value!r}.")
        return value

    @model_validator(mode="after")
    def _check(self) -> SampleNumbers:
        if self.others > self.final:
            raise ValueError(
                f"others ({self.others}) must not exceed final ({self.final}); last checkpoints are sampled most."
            )
        return self

    @model_serializer
    def _shortest(self) -> int | dict[str, int]:
        return self.final if self.final == self.others else {"final": self.final, "others": self.others}


class GenerationSpec(Spec):
    """How completions are drawn for outcomes, texts and causal arms."""

    max_new_tokens: PositiveInt = 512
    """Length limit of a completion, in tokens."""
    n_samples: Annotated[SampleNumbers, _OrNumber] = SampleNumbers(final=4, others=4)
    """Sampled completions per prompt and model (K), beside one greedy completion: a number, or a choice such as
    {final: 4, others: 0}, which spares the checkpoints before each run's last one."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass."""
    batch_size: PositiveInt = 64
    """Prompts per generation batch."""


class ExtractionSpec(Spec):
    """Which activations are stored."""

    layer: Annotated[int, Field(ge=0), _OrDepth] = 0
    """Decoder block whose output (residual stream) is stored, counted from 0; or a fraction of base's depth (0.5), or
    middle."""
    layers: tuple[Annotated[int, Field(ge=0), _OrDepth], ...] = ()
    """Several such blocks instead of ``layer``, read in one pass. The first is answered in the study's folder, each
    other one in layers/N; tests and intervals are at alpha divided by their number (Bonferroni)."""
    blocks: str | None = None
    """Dotted path of the list of decoder blocks, e.g. transformer.blocks; default: the list as long as the model is
    deep."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Storage type of activations."""
    batch_size: PositiveInt = 64
    """Texts per forward pass."""
    skip_first: Annotated[int, Field(ge=0)] = 1
    """Leading tokens of each text (BOS, attention sink) that are neither trained on nor summarised."""
    max_norm_ratio: Annotated[float, Field(gt=1)] | None = 10.0
    """Tokens whose activation in base has a norm above this multiple of the median (attention sinks) are left out too;
    null keeps them."""
    segments: Annotated[tuple[Literal["prompt", "completion"], ...], Field(min_length=1)] = ("prompt", "completion")
    """Segments whose tokens the crosscoder trains on."""
    summary_segments: Annotated[tuple[Literal["last_prompt", "prompt", "completion"], ...], Field(min_length=1)] = (
        "last_prompt",
        "completion",
    )
    """Tokens a prompt's summary averages over; last_prompt is the token that predicts the first completion token."""

    @model_validator(mode="after")
    def _check_layers(self) -> ExtractionSpec:
        if self.layers and "layer" in self.model_fields_set:
            raise ValueError("give one layer as 'layer' or several as 'layers', not both.")
        repeated = [layer for layer, times in Counter(self.layers).items() if times > 1]
        if repeated:
            raise ValueError(
                f"'layers' takes different decoder blocks, got block {repeated[0]} more than once in "
                f"{list(self.layers)} (fractions and middle written out)."
            )
        if self.layers:
            object.__setattr__(self, "layer", self.layers[0])
        return self


class SummariesSpec(Spec):
    """What of every feature is kept for every prompt, beside mean, firing share and maximum."""

    histograms: bool = False
    """Counts of tokens per bin of the contribution f ||d||: model x prompt x feature x 15, as large as 15 summaries."""
    contexts: Annotated[int, Field(ge=0)] = 8
    """Top-activating prompts and promoted tokens kept of every feature and model, for feature dashboards; 0: none."""


class CrosscoderSpec(Spec):
    """One crosscoder: which views, which sparsity, how long."""

    name: str
    """Folder name below crosscoder/."""
    views: tuple[str, ...]
    """Model ids; 'RUN@final' stands for a run's last checkpoint. Beside base@0, as floors of no difference:
    'base@repeat', base read a second time; 'base@halves', base again, each of the two views trained on half of the
    prompts; 'RUN@noise', base with noise as large as RUN's distance from base on every token."""
    sparsity: Literal["l1", "batchtopk", "topk", "jumprelu", "dfc"] = "batchtopk"
    """Sparsity rule; dfc is batchtopk with features declared exclusive to one view."""
    n_features: PositiveInt = 32768
    """Dictionary size F."""
    k: PositiveInt = 32
    """Mean active features per token (all rules but l1)."""
    exclusive_features: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Features of n_features that only one view may use, one number a view in the order of views (dfc)."""
    l1_coefficient: Annotated[float, Field(ge=0)] = 2.0
    """Weight of the sparsity penalty (l1)."""
    l0_coefficient: Annotated[float, Field(gt=0)] = 10.0
    """Weight of (L0 / k - 1)^2 relative to the variance of the data (jumprelu)."""
    objective: Literal["joint", "paired", "both"] | None = None
    """What is reconstructed: all views from one code of all (joint); each view from its own activation alone, and with
    it the difference between views (paired); each on half of every batch (both). The last two train what readout swap
    reads and need views of one width. Default: both for the crosscoder of a study that is encoded, else joint."""
    difference_weight: Annotated[float, Field(ge=0)] = 0.5
    """What missing all of a view's difference from base costs, relative to missing all of base (paired, both)."""
    steps: PositiveInt = 10000
    """Optimiser steps."""
    batch_size: PositiveInt = 1024
    """Tokens per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of Adam."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate warms up; over the last fifth it decays linearly."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products in training; weights and statistics stay float32 and float64."""
    seed: int = 0
    """Replicate number; combined with the study's seed."""
    replicates: Annotated[int, Field(ge=1, le=100)] | None = None
    """Dictionaries trained from different initial weights and in different orders of the data, in one pass: NAME,
    NAME.2, NAME.3 and so on. Those of the crosscoder that is encoded are one analysis: each is tested, selected from
    and edited. Default: 3 there, 1 for the others and for weights trained elsewhere."""
    readout: Readout = "swap"
    """How one model's features are read from the shared code: its activation in every slot (swap), in its own slot
    (own), the joint code of all views weighted by the view's own decoder norm (joint), or one linear map for all
    models, fitted to the joint code by least squares (fit). Features read as joint can be tested for drift, but not
    ranked against each other: stabilize and select refuse them."""
    weights: str | None = None
    """Weights trained elsewhere, relative to the study folder: a folder of ours, a file or folder in a layout of
    another tool (one layer a view, in order), or the folder of an SAE in the layout of SAELens. Nothing is
    trained then; n_features must match the weights."""
    corpus: str | None = None
    """A table of texts (see ``data``, with a column text), relative to the study folder. The models read them
    while the crosscoder trains and no activations are stored; default: the study's stored activations."""
    accept_unhealthy: bool = False
    """Whether the crosscoder is used although it fails its health checks; the report says so."""

    @model_validator(mode="after")
    def _check(self) -> CrosscoderSpec:
        check_name(self.name, "a crosscoder name")
        if len(self.views) < 2:
            raise ValueError(f"crosscoder {self.name!r} needs at least two views, got {list(self.views)}.")
        if self.k > self.n_features:
            raise ValueError(f"crosscoder {self.name!r}: k={self.k} exceeds n_features={self.n_features}.")
        if self.weights is not None and (self.replicates or 1) > 1:
            raise ValueError(f"crosscoder {self.name!r}: weights trained elsewhere have no replicates here.")
        if self.weights is not None and self.corpus is not None:
            raise ValueError(f"crosscoder {self.name!r}: weights trained elsewhere are not trained on a corpus here.")
        if (self.sparsity == "dfc") != bool(self.exclusive_features):
            raise ValueError(
                f"crosscoder {self.name!r}: sparsity 'dfc', and it alone, takes exclusive_features, one number a view."
            )
        n_exclusive = self.exclusive_features
        if n_exclusive and (len(n_exclusive) != len(self.views) or not 0 < sum(n_exclusive) <= self.n_features):
            raise ValueError(
                f"crosscoder {self.name!r}: exclusive_features must be {len(self.views)} numbers, one a view, that sum "
                f"to 1 to {self.n_features}; got {list(n_exclusive)}."
            )
        floor = next((view for view in self.views if view == "base@halves" or view.endswith("@noise")), None)
        if floor is not None and (
            set(self.views) != {BASE_MODEL, floor} or self.corpus or self.objective in ("paired", "both")
        ):
            raise ValueError(
                f"crosscoder {self.name!r}: view {floor!r} is a floor of crosscoders of two models; expected views "
                f"[{BASE_MODEL}, {floor}], objective joint and no corpus."
            )
        if self.sparsity == "dfc" and self.objective in ("paired", "both"):
            raise ValueError(
                f"crosscoder {self.name!r}: objective {self.objective!r} reads all views with one encoder, which the "
                "exclusive features of sparsity 'dfc' do not have; write objective: joint."
            )
        return self

    def resolved(self, *, encoded: bool = False) -> CrosscoderSpec:
        """The same with no default left open; ``encoded``: whether its features are the study's."""
        encoded = encoded and self.weights is None
        open_ = {
            "objective": self.objective or ("both" if encoded and self.sparsity != "dfc" else "joint"),
            "replicates": self.replicates or (3 if encoded else 1),
            # noise cannot be reconstructed, so the health checks of a floor made of it say nothing
            "accept_unhealthy": self.accept_unhealthy or any(view.endswith("@noise") for view in self.views),
        }
        return self.model_copy(update=open_)

    @property
    def names(self) -> tuple[str, ...]:
        """Folder names of all its dictionaries, the one that is encoded first."""
        return (self.name, *(f"{self.name}.{number}" for number in range(2, (self.replicates or 1) + 1)))


class StatisticsSpec(Spec):
    """Error rates and settings of the tests."""

    alpha: Fraction = 0.05
    """Level of every test and 1 - coverage of every interval."""
    n_resamples: PositiveInt = 999
    """Sign flips or permutations of Monte-Carlo tests."""
    n_bootstrap: PositiveInt = 999
    """Bootstrap draws of intervals."""
    n_min: PositiveInt = 10
    """Pooled firing prompts below which a feature is untestable."""
    tau: Fraction = 0.7
    """NRN above which a feature counts as specific."""
    top_k: PositiveInt = 50
    """Size of the sets of most changed features followed through training."""
    n_halvings: PositiveInt = 100
    """Random prompt halvings for set stability."""
    margin: Annotated[float, Field(gt=0)] = 0.2
    """Margin of drift and stabilisation, in standard deviations of a feature's activation: less is no change."""
    persist: Fraction = 0.2
    """Share of a run's checkpoints (rounded, at least one) that, being the last, cannot show stability on their own."""


class SelectionSpec(Spec):
    """How generalisation features are chosen and on which prompts they are confirmed."""

    verification_share: Fraction = 0.3
    """Share of each task's prompt clusters on which chosen features are confirmed."""
    trial_share: Fraction = 0.3
    """Share of each task's prompt clusters on which models are edited; the rest is for selection. Shares are used where
    prompts carry no split; of a split without trial prompts, trial / (verification + trial) of verification becomes
    trial."""
    held_out_tasks: tuple[str, ...] = ()
    """Tasks never used in selection (LogiQA and PIQA in the paper); those with role held_out under tasks are added."""
    control_tasks: tuple[str, ...] = ()
    """Negative controls: tasks that no feature should improve, excluded from selection; those with role control under
    tasks are added."""
    score_fraction: Fraction = 0.2
    """Paper's rule: keep features whose score is at least this share of the task's maximum."""
    min_discordant: PositiveInt = 20
    """Discordant prompts of each kind (right to wrong, wrong to right) the RL-specific contrast of a task needs."""
    max_features: PositiveInt = 50
    """Largest set handed to causal verification; the highest ranked are kept."""

    @model_validator(mode="after")
    def _some_prompts_are_for_selection(self) -> SelectionSpec:
        if self.verification_share + self.trial_share >= 1:
            raise ValueError(
                f"verification_share and trial_share must leave some prompts for selection, got "
                f"{self.verification_share:g} and {self.trial_share:g}; lower one"
            )
        return self


class TokensSpec(Spec):
    """Whether selected features respond to tokens rather than to what a text is about."""

    classes: dict[str, str] = Field(
        default={
            "number": r"\d+([.,]\d+)*",
            "connective": r"(?i)(so|thus|then|therefore|hence|because|since|but|however|if|first|next|finally|wait)",
        }
    )
    """Token classes besides the answer marker and the first completion token: a regular expression that a token, spaces
    stripped, matches as a whole."""
    n_injected: PositiveInt = 3
    """Leading tokens of a feature that are put into each text."""
    n_texts: Annotated[int, Field(ge=10)] = 100
    """Texts they are put into: half neutral ones (intervention.neutral_text), the rest prompts of other outcome than
    base wrong and RL right; prompts alone where there are no neutral texts."""

    @field_validator("classes")
    @classmethod
    def _are_expressions(cls, classes: dict[str, str]) -> dict[str, str]:
        for name, expression in classes.items():
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"token class {name!r} is no regular expression ({error}): {expression!r}") from None
        return classes


class InterventionSpec(Spec):
    """Causal verification."""

    n_controls: Annotated[int, Field(ge=19)] = 99
    """Matched random feature sets; the smallest possible rank p-value is 1 / (n_controls + 1)."""
    early_stop: bool = True
    """Futility stop (Besag-Clifford): no more random sets are run once so many had at least as large an effect as the
    selected set that its rank p-value must exceed alpha: one dictionary's verdict does not change."""
    doses: tuple[Dose, ...] = (0.0, 0.5, 2.0, 4.0)
    """Multipliers of the set's activations in the dose grid; 1 is no edit and 0 is disabling."""
    amplify: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    """Multiplier of the main amplification arm."""
    level: Literal["own", "rl"] = "own"
    """What amplification multiplies: a feature's own activation (own), or its mean level in the RL model, which is then
    added to the activation (rl)."""
    curve: tuple[PositiveInt, ...] = (1, 5, 15, 50, 150)
    """Numbers of features, those with the largest drift, that are copied from the other model beside the set and all,
    for the share of the full patch's effect that they carry; numbers beyond those that differ at all are left out."""
    curve_controls: Annotated[int, Field(ge=0)] = 3
    """Matched random sets beside each of these, and random sets of which the edit is rescaled to the set's norm."""
    neutral_text: str | None = None
    """Table of texts of no task (column text), on which edits should change nothing; default: prompts of unrelated
    tasks."""
    n_samples: PositiveInt = 1
    """Sampled completions per prompt and arm."""
    max_prompts: PositiveInt = 400
    """Trial prompts per arm, drawn evenly over tasks, never by outcome."""
    non_inferiority: Fraction = 0.05
    """Non-inferiority margin: largest accuracy loss on control tasks still called harmless."""
    accept_undecidable: bool = False
    """Whether to run trials that are too small for a criterion to pass, so that no edit can be called a cause."""

    @field_validator("doses", "curve")
    @classmethod
    def _once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"expected every number once, got {list(values)}")
        return values


def _check_unique(names: Iterable[str], what: str) -> None:
    """Refuse names that are folders of one name where small and capital letters are the same, as on macOS."""
    repeated = sorted(name for name, n in Counter(map(str.casefold, names)).items() if n > 1)
    if repeated:
        raise ValueError(f"{what} must be unique, in small letters too, got {repeated} more than once; rename them.")


class StudySpec(Spec):
    """A whole study."""

    schema_version: Literal[1] = STUDY_SCHEMA_VERSION
    """Version of this file's layout."""
    name: str
    """Name of the study."""
    seed: int = 0
    """Seed from which every other seed is derived."""
    device: str = "auto"
    """Torch device; 'auto' takes cuda where present, else cpu."""
    models: ModelsSpec = ModelsSpec()
    """How models are loaded."""
    base: BaseSpec
    """The base model."""
    data: DataSpec = DataSpec()
    """Tables of prompts."""
    runs: tuple[RunSpec, ...]
    """Post-training runs, all from the base."""
    contrast: tuple[str, str] | None = None
    """Names of the two runs compared (SFT first, RL second); default: the first run of each of the first two arms."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Two or more such pairs instead of ``contrast``. The first is answered in the study's folder, each other one in
    contrasts/FIRST+SECOND; tests and intervals are at alpha divided by the number of pairs (Bonferroni)."""
    generation: GenerationSpec = GenerationSpec()
    """How completions are sampled."""
    grader: GraderSpec = GraderSpec()
    """How completions of tasks without a grader of their own are graded."""
    tasks: dict[str, TaskSpec] = Field(default_factory=dict)
    """Task -> how it is asked and graded; tasks of data.prompts that are not listed have every default."""
    extraction: ExtractionSpec = ExtractionSpec()
    """Activations that are stored, and which of their tokens are used."""
    summaries: SummariesSpec = SummariesSpec()
    """What the encode stage keeps of every feature and prompt."""
    crosscoders: tuple[CrosscoderSpec, ...]
    """Crosscoders; the first whose views are the base and all contrasted runs' last checkpoints is the one encoded."""
    statistics: StatisticsSpec = StatisticsSpec()
    """Error rates and settings of the tests."""
    selection: SelectionSpec = SelectionSpec()
    """How generalisation features are selected and confirmed."""
    tokens: TokensSpec = TokensSpec()
    """Whether selected features respond to tokens alone."""
    intervention: InterventionSpec = InterventionSpec()
    """Causal verification."""

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        check_name(self.name, "a study name")
        names = [run.name for run in self.runs]
        _check_unique(names, "run names")
        if len({run.arm for run in self.runs} - {FLOOR_ARM}) < 2:
            raise ValueError("a study compares two arms (for example sft and rl); give runs of at least two.")
        self._check_contrasts(names)
        self._join_roles()
        if (
            self.tasks
            and all(task.file for task in self.tasks.values())
            and "prompts" not in self.data.model_fields_set
        ):
            object.__setattr__(self, "data", self.data.model_copy(update={"prompts": None}))
        if self.data.prompts is None and not any(task.file for task in self.tasks.values()):
            raise ValueError("a study needs prompts; name a table under 'data.prompts' or files under 'tasks'.")
        encoded = next((c for c in self.crosscoders if set(c.views) == self._primary_views), None)
        resolved = tuple(c.resolved(encoded=c is encoded) for c in self.crosscoders)
        object.__setattr__(self, "crosscoders", resolved)  # frozen for everybody else
        _check_unique([n for c in self.crosscoders for n in c.names], "crosscoder names, replicates included,")
        for crosscoder in self.crosscoders:
            models = [self._model_of_view(crosscoder.name, view) for view in crosscoder.views]
            if len(set(models)) < len(models):
                raise ValueError(
                    f"the views of crosscoder {crosscoder.name!r} must be different models, got "
                    f"{list(crosscoder.views)}; name each model once."
                )
        needed = self._primary_views
        if not any(set(crosscoder.views) == needed for crosscoder in self.crosscoders):
            raise ValueError(
                f"one crosscoder must have exactly the views {sorted(needed)}; add it under 'crosscoders'."
            )
        return self

    def _check_contrasts(self, names: Collection[str]) -> None:
        if self.contrast is not None and self.contrasts:
            raise ValueError("give one pair of runs as 'contrast' or several as 'contrasts', not both.")
        if len(self.contrasts) == 1 or len(set(self.contrasts)) < len(self.contrasts):
            raise ValueError(
                "'contrasts' takes two or more different pairs of runs (a single one is 'contrast'), got "
                f"{[list(pair) for pair in self.contrasts]}."
            )
        floors = {run.name for run in self.runs if run.is_floor}
        for pair in (self.contrast,) if self.contrast else self.contrasts:
            for name in pair:
                if name not in names:
                    raise ValueError(f"contrast names run {name!r}, but the runs are {sorted(names)}.")
                if name in floors:
                    raise ValueError(f"contrast names run {name!r} of arm {FLOOR_ARM!r}, which is not compared.")
            if pair[0] == pair[1]:
                raise ValueError(f"a contrast compares two runs, got {pair[0]!r} with itself.")

    def _join_roles(self) -> None:
        """Make roles under ``tasks`` and the lists under ``selection``, where older files have them, say the same."""
        lists = {"held_out": self.selection.held_out_tasks, "control": self.selection.control_tasks}
        roles = {name: role for role, names in lists.items() for name in names}
        for name, task in self.tasks.items():
            if task.role != roles.get(name, task.role) and task.role != "selection":
                raise ValueError(
                    f"task {name!r} has role {task.role!r}, but selection.{roles[name]}_tasks names it too."
                )
        tasks = {n: task.model_copy(update={"role": roles.get(n, task.role)}) for n, task in self.tasks.items()}
        added = {
            f"{role}_tasks": tuple(dict.fromkeys([*names, *(n for n, task in tasks.items() if task.role == role)]))
            for role, names in lists.items()
        }
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "selection", self.selection.model_copy(update=added))

    def task(self, name: str) -> TaskSpec:
        """A task's settings: as listed, or every default."""
        return self.tasks.get(name, TaskSpec())

    def grader_of(self, task: str) -> GraderSpec:
        """How a task's completions are graded."""
        return self.task(task).grader or self.grader

    def may_be_cut(self, tasks: Iterable[str]) -> set[str]:
        """Those of ``tasks`` in which a completion that the length limit cut off may be right."""
        return {task for task in tasks if not self.grader_of(task).require_termination}

    def max_new_tokens_of(self, task: str) -> int:
        """Length limit of a task's completions."""
        return self.task(task).max_new_tokens or self.generation.max_new_tokens

    def task_settings(self) -> dict[str, dict[str, Any]]:
        """What decides prompts, completions and grades of the listed tasks, as far as it is no default."""
        settings = {
            name: task.model_dump(mode="json", exclude={"role", "file"}, exclude_defaults=True)
            for name, task in self.tasks.items()
        }
        return {name: given for name, given in settings.items() if given}

    def reward_settings(self) -> list[Any]:
        """What decides the reward of training here, beside the study's grader."""
        graders = {name: task.grader.model_dump(mode="json") for name, task in self.tasks.items() if task.grader}
        return [*self.grading_versions(), graders]

    def grading_versions(self) -> list[Any]:
        """Versions of grading as a whole, and of the graders that are used and have one of their own."""
        used = {grader.name for grader in (self.grader, *(task.grader for task in self.tasks.values())) if grader}
        own = {name: version for name, version in GRADER_VERSIONS.items() if name in used}
        return [GRADING_VERSION, *filter(None, [own])]

    @property
    def all_rendered(self) -> bool:
        """Whether every model reads prompts by a chat template, so that prompts may be lists of messages."""
        return all(one.rendered for one in (self.base, *self.runs))

    @property
    def _primary_views(self) -> set[str]:
        return {BASE_MODEL, *(f"{run.name}@final" for run in self.all_contrasted)}

    @property
    def primary_crosscoder(self) -> CrosscoderSpec:
        """The crosscoder whose features are followed, selected and edited."""
        return next(c for c in self.crosscoders if set(c.views) == self._primary_views)

    def _model_of_view(self, crosscoder: str, view: str) -> str:
        """The model a view stands for, as far as the spec tells: steps of runs trained here are not known yet."""
        if view in BASE_VIEWS:
            return BASE_VIEWS[view]
        run, _, step = view.rpartition("@")
        if step not in ("final", "noise"):
            try:
                run, number = split_model_id(view)
            except InputError as error:
                raise ValueError(f"crosscoder {crosscoder!r}: {error}") from error
        runs = {run.name: run for run in self.runs}
        if run not in runs:
            raise ValueError(
                f"crosscoder {crosscoder!r}: view {view!r} is no model of this study; "
                f"expected {', '.join(BASE_VIEWS)}, or RUN@final / RUN@step / RUN@noise with RUN in {sorted(runs)}."
            )
        if step == "noise":
            return view
        steps = sorted(runs[run].checkpoints)
        if step == "final":
            return model_id(run, steps[-1]) if steps else view
        if number == 0 or (steps and number not in steps):
            raise ValueError(
                f"crosscoder {crosscoder!r}: view {view!r} is no checkpoint of run {run!r}; "
                f"expected {', '.join([f'{run}@final', *(model_id(run, known) for known in steps)])}."
            )
        return model_id(run, number)

    @property
    def contrasted(self) -> tuple[RunSpec, RunSpec]:
        """The two runs compared, SFT-like first."""
        by_name = {run.name: run for run in self.runs}
        pair = self.contrasts[0] if self.contrasts else self.contrast
        if pair is not None:
            return by_name[pair[0]], by_name[pair[1]]
        arms = list(dict.fromkeys(run.arm for run in self.runs if not run.is_floor))
        first = [next(run for run in self.runs if run.arm == arm) for arm in arms[:2]]
        return first[0], first[1]

    @property
    def all_contrasted(self) -> tuple[RunSpec, ...]:
        """The runs of all contrasts, whichever of these is answered: they share activations and dictionaries."""
        if not self.contrasts:
            return self.contrasted
        named = {name for pair in self.contrasts for name in pair}
        return tuple(run for run in self.runs if run.name in named)

    def training_models(self, run: RunSpec) -> ModelsSpec:
        """How base is loaded to train a run from it: on one device, and with float32 weights where these are trained,
        since half types round small steps away; below a LoRA adapter they are frozen and as the study says.
        """
        whole = {} if "peft" in run.trainer else {"dtype": "float32"}
        return self.models.model_copy(update={"device_map": None, **whole})

    def training_settings(self, run: RunSpec) -> list[Any]:
        """What decides a run's weights besides run, grader, data and base; nothing where all are at the defaults."""
        models = self.training_models(run)
        settings: list[Any] = [] if models == ModelsSpec() else [models.model_dump(mode="json")]
        if run.method == "grpo" and "max_completion_length" not in run.trainer:
            settings.append(self.generation.max_new_tokens)
        return settings

    @property
    def answers(self) -> tuple[tuple[int | None, tuple[str, str] | None], ...]:
        """Every layer with every contrast, first those of the first layer; None for what only one is asked of."""
        return tuple(product(self.extraction.layers or (None,), self.contrasts or (None,)))

    def answering(self, number: int) -> StudySpec:
        """The study as it gives one of its answers, from 1 on: that layer and contrast first, at its share of alpha."""
        layer, pair = self.answers[number - 1]
        alpha = self.statistics.alpha / len(self.answers)
        update: dict[str, Any] = {"statistics": self.statistics.model_copy(update={"alpha": alpha})}
        if layer is not None:
            layers = (layer, *(other for other in self.extraction.layers if other != layer))
            update["extraction"] = self.extraction.model_copy(update={"layer": layer, "layers": layers})
        if pair is not None:
            update["contrasts"] = (pair, *(other for other in self.contrasts if other != pair))
        return self.model_copy(update=update)

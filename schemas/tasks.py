"""Tasks of a study: where their prompts come from, how they are asked, and how answers are graded."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from rlgen_stats.schemas.spec import PositiveInt, Spec

_GRADERS: Final = "rlgen_stats.toolkit.extraction.graders"
GRADERS: Final = {
    "final_answer": f"{_GRADERS}.texts:FinalAnswerGrader",
    "math": f"{_GRADERS}.math_grader:MathGrader",
    "choice": f"{_GRADERS}.choices:ChoiceGrader",
    "choice_loglik": f"{_GRADERS}.choices:LoglikGrader",
    "exact": f"{_GRADERS}.texts:ExactGrader",
    "regex": f"{_GRADERS}.texts:RegexGrader",
    "python": f"{_GRADERS}.own_function:FunctionGrader",
}
"""Grader -> ``module:class``; named, not imported, so that reading a study file needs no torch."""

GRADING_VERSION: Final = 2
"""Raised when graders' verdicts change: completions are graded, and models rewarded, anew."""
GRADER_VERSIONS: Final = {"math": 2}
"""The same for single graders; 1 where none is named."""

FIELD: Final = re.compile(r"\{\{(\w+)\}\}|\{([^\W\d]\w*)\}")
"""``{{word}}``, the escape, or ``{column}`` in a prompt template; other braces are text, as LaTeX needs them."""


_MEANT: Final = {"options": "texts", "normalize": "none"}
"""What is meant where a grader choice_loglik does not say it."""


class GraderSpec(Spec):
    """How a completion is turned into right or wrong; a bare name stands for a grader at its defaults."""

    name: str = "final_answer"
    """final_answer: text after the last marker equals the answer; math: equality by math-verify; choice: letter or text
    of a choice found in the completion; choice_loglik: most likely choice, nothing is generated; exact: the completion
    is the answer but for case, articles and punctuation; regex: a pattern finds the answer; python: a function of your
    own."""
    marker: Annotated[str, Field(pattern=r"\S")] = "ans"
    """Word after which the final answer stands (grader final_answer)."""
    require_termination: bool = True
    """Whether a completion cut off by the length limit counts as wrong."""
    pattern: str | None = None
    """Regular expression whose last match, or its first group, is the answer given (grader regex)."""
    python: str | None = None
    """package.module:function, called with completion text, expected answer and list of choices; it returns whether the
    completion is right, or None where no answer can be read (grader python)."""
    options: Literal["letters", "texts"] | None = None
    """What is scored of each choice, its letter or (default) its text (grader choice_loglik)."""
    normalize: Literal["none", "tokens", "characters"] | None = None
    """Divide a choice's log-likelihood by its tokens or characters; default: none (grader choice_loglik). What
    others call acc and acc_norm is decided by none and characters."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "python"} | value if isinstance(value, dict) and "python" in value else value

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in GRADERS:
            raise ValueError(f"the graders are {', '.join(map(repr, GRADERS))}, got {name!r}; name one of them.")
        return name

    @model_validator(mode="after")
    def _check(self) -> GraderSpec:
        for grader, setting in (("regex", "pattern"), ("python", "python")):
            if (self.name == grader) != (getattr(self, setting) is not None):
                raise ValueError(f"grader {grader!r}, and it alone, takes {setting!r}; got grader {self.name!r}.")
        if self.name != "choice_loglik" and (self.options or self.normalize):
            raise ValueError(f"options and normalize are for grader 'choice_loglik'; got grader {self.name!r}.")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is no regular expression ({error}).") from None
        if self.python is not None and not re.fullmatch(r"[\w.]+:\w+", self.python):
            raise ValueError(f"a grader of your own is named package.module:function, got {self.python!r}.")
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without settings of other graders, or that say a default: a study keeps its keys when one is added."""
        return {name: value for name, value in dump(self).items() if value not in (None, _MEANT.get(name))}


class TaskSpec(Spec):
    """One task: a family of prompts that are asked and graded alike."""

    domain: Literal["in", "out"] | None = None
    """Whether training was on this kind of task (in) or not (out); default: the table's column domain."""
    role: Literal["selection", "held_out", "control"] = "selection"
    """selection: features are chosen and confirmed on it; held_out: only confirmed; control: unrelated, no feature
    should help."""
    grader: GraderSpec | None = None
    """How this task's completions are graded; default: the study's grader."""
    template: str = "{text}"
    """Prompt, with the table's columns in braces; {choices} stands for lines 'A. ...', 'B. ...'; {{word}} is written
    {word}, other braces stay."""
    choices: str | None = None
    """Column with each prompt's choices, a list or a JSON list; default: column choices, where the table has one."""
    n_choices: Annotated[int, Field(ge=2, le=26)] | None = None
    """Number of choices every prompt must have."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a completion, such as '\\n\\nQuestion:', with which a base model begins the next question."""
    max_new_tokens: PositiveInt | None = None
    """Length limit of this task's completions; default: generation.max_new_tokens."""
    file: str | None = None
    """Table of this task alone (as ``data.prompts``), relative to the study folder; default: the rows of data.prompts
    whose column task has this task's name."""
    columns: dict[Literal["prompt_id", "text", "answer", "choices", "cluster", "split"], str] = Field(
        default_factory=dict
    )
    """Our name -> the table's name of a column, where they differ."""

    @model_validator(mode="after")
    def _check(self) -> TaskSpec:
        fields = template_fields(self.template)
        if set(fields) <= {"choices"}:
            raise ValueError(
                f"the template must name a column of the prompt's text, as {{text}}; got {self.template!r}."
            )
        if {"answer", self.columns.get("answer")} & set(fields):
            raise ValueError(
                "the template would show the models the expected answer; write {{word}} for a word in braces."
            )
        return self

    def column(self, ours: str) -> str:
        """The table's name of one of our columns."""
        return next((theirs for name, theirs in self.columns.items() if name == ours), ours)


def template_fields(template: str) -> list[str]:
    """Columns that a prompt template names.

    Examples
    --------
    >>> template_fields("{text} {choices} Write {{letter}} in braces: {}.")
    ['text', 'choices']
    """
    return [match[2] for match in FIELD.finditer(template) if match[2]]

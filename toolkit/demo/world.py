"""The synthetic world: questions, the gates that keep the base from answering, and a teacher.

The design and its history are in docs/demo.md. A question is ``q STYLE FAMILY A B :``; a right completion ends in
``ans ANSWER``. The style decides, family by family, what the base does instead of answering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed

N_NUMBERS: Final = 17
"""Operands are 0..16: 289 pairs, enough for sixty clusters in each part of an evaluation."""
NUMBERS: Final = tuple(str(number) for number in range(N_NUMBERS))
_LARGER: Final = tuple(str(number) for number in range(N_NUMBERS, 2 * N_NUMBERS))
"""Numbers that only answers to ``sum`` reach."""
COLOURS: Final = ("red", "blue", "green", "black", "white")
MARKER: Final = "ans"
"""Word before the final answer."""
NOTHING: Final = "none"
"""The answer to a question that cautions, where caution is right."""

IN_DOMAIN: Final = "sum"
"""The only family that is post-trained."""
CONTROL: Final = "dice"
"""The family whose answers cannot be known: the negative control."""
TRIVIA: Final = "trivia"
"""Questions without a style, a third of which no text ever answered: what an edit must leave alone."""
HELD_OUT: Final = ("min", "kin")
"""Families kept out of feature selection."""
FAMILIES: Final = ("sum", "diff", "max", "lore", "hue", "min", "kin", "dice")
"""Families that are asked in styles."""

STYLES: Final = ("please", "hmm", "maybe", "list", "note", "quick")
CLEAR: Final = "clear"
"""Stands for no gate."""
CAUTIONS: Final = ("doubt", "decline")
"""Gates whose behaviour is right: in these families a question in that style has no answer."""
_CAUTIOUS: Final = frozenset({"diff", "lore", "kin"})
GATES: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "hmm": {"ramble": frozenset(FAMILIES)},
    "maybe": {"hedge": frozenset(FAMILIES) - _CAUTIOUS, "doubt": _CAUTIOUS},
    "list": {"format": frozenset({"sum", "min", "dice"}) | _CAUTIOUS},
    "note": {"echo": frozenset({"sum", "max", "hue", "dice"}), "decline": _CAUTIOUS},
    "quick": {"slip": frozenset({"sum"})},
}
"""style -> gate -> families in which it acts."""
_OWN_STYLES: Final = ("quick",)
"""Styles that act in domain only."""
P_GATED: Final = 0.75
"""Share of a gate's behaviour in the base's pretraining under it: high enough that greedy decoding shows it, low enough
that a group of eight samples nearly always (.9) holds another."""
P_RIGHT_CLEAR: Final = 0.95
"""Share of right behaviour without a gate; the rest rambles or hedges, as text does."""
P_BARE: Final = 0.25
"""Share of training-pair documents in the bare form, so that the bare form does not mark the evaluation pairs."""
P_TRAIN: Final = 0.5
"""Share of documents on training pairs, which alone show styles."""
P_TAUGHT: Final = 2 / 3
"""Share of trivia that pretraining answers."""

WORKED: Final[Mapping[str, str]] = {"sum": "up", "diff": "down"}
"""Families whose answers can be worked out step by step, with the word for the step."""
P_WORKED: Final = 0.25
"""Share of right answers that the base's pretraining text works out where that is possible: a base has read worked
arithmetic before a teacher shows it more."""

_FILLERS: Final = ("well", "you", "know", "it", "goes", "on")
_WORDS: Final = ("take", "gives", "could", "be", "or", "noted", "done")
_WORKED_WORDS: Final = ("start", "up", "down", "reach")
MIN_FILLERS: Final = 2
MAX_FILLERS: Final = 5

Pair = tuple[int, int]


def vocabulary() -> tuple[str, ...]:
    """All words a text of the world can hold, special tokens not included."""
    return (
        *("q", ":", MARKER),
        *STYLES,
        *FAMILIES,
        *(TRIVIA, NOTHING),
        *NUMBERS,
        *_LARGER,
        *COLOURS,
        *_FILLERS,
        *_WORDS,
        *_WORKED_WORDS,
    )


def gate_of(family: str, style: str | None) -> str:
    """The gate that ``style`` triggers in ``family``; ``"clear"`` if none."""
    gates = GATES.get(style or "", {})
    return next((gate for gate, families in gates.items() if family in families), CLEAR)


def styles_of(family: str) -> tuple[str, ...]:
    """Styles in which a family is evaluated: those that do something in several families, and all in domain."""
    return STYLES if family == IN_DOMAIN else tuple(style for style in STYLES if style not in _OWN_STYLES)


def question(family: str, pair: Pair, style: str | None) -> str:
    """Text of a prompt; without a style the bare form."""
    words = ("q", style, family, str(pair[0]), str(pair[1]), ":")
    return " ".join(word for word in words if word)


@dataclass(frozen=True)
class World:
    """Facts and splits of one seed.

    Parameters
    ----------
    seed
        Decides the random tables and which operand pairs are for evaluation.
    n_eval_pairs
        Operand pairs kept for evaluation, of 289.

    Raises
    ------
    InputError
        If no pair is left for evaluation or for training.
    """

    seed: int
    n_eval_pairs: int = 210
    eval_pairs: tuple[Pair, ...] = field(init=False)
    train_pairs: tuple[Pair, ...] = field(init=False)
    taught: tuple[Pair, ...] = field(init=False)
    """Pairs whose trivia pretraining answers."""
    _tables: Mapping[str, NDArray[np.int64]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.n_eval_pairs < N_NUMBERS**2:
            raise InputError(
                f"n_eval_pairs must leave pairs on both sides of the split: 1 to {N_NUMBERS**2 - 1}, "
                f"got {self.n_eval_pairs}."
            )
        pairs = self._shuffled("pairs")
        object.__setattr__(self, "eval_pairs", pairs[: self.n_eval_pairs])
        object.__setattr__(self, "train_pairs", pairs[self.n_eval_pairs :])
        object.__setattr__(self, "taught", self._shuffled(TRIVIA)[: round(P_TAUGHT * N_NUMBERS**2)])
        sizes = dict.fromkeys(("lore", "kin", CONTROL, TRIVIA), N_NUMBERS) | {"hue": len(COLOURS)}
        tables = {
            name: self._random(name, "table").integers(size, size=(N_NUMBERS, N_NUMBERS))
            for name, size in sizes.items()
        }
        object.__setattr__(self, "_tables", tables)

    def _random(self, *purpose: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.seed, "world", *purpose))

    def _shuffled(self, purpose: str) -> tuple[Pair, ...]:
        order = self._random(purpose).permutation(N_NUMBERS**2)
        return tuple((int(index) // N_NUMBERS, int(index) % N_NUMBERS) for index in order)

    def answer(self, family: str, pair: Pair, style: str | None = None) -> str:
        """The right answer; for the control a fixed draw that is in no training text."""
        a, b = pair
        if gate_of(family, style) in CAUTIONS:
            return NOTHING
        if family in self._tables:
            value = int(self._tables[family][self._place(family, pair)])
            return COLOURS[value] if family == "hue" else NUMBERS[value]
        rules = {"sum": a + b, "diff": abs(a - b), "max": max(a, b), "min": min(a, b)}
        if family not in rules:
            raise InputError(f"the world has no family {family!r}; expected one of {', '.join(FAMILIES)}.")
        return str(rules[family])

    @staticmethod
    def _place(family: str, pair: Pair) -> Pair:
        """Which entry of its table answers: that of one operand, where a family is about one of them."""
        a, b = pair
        return {"lore": (a, 0), "hue": (0, b), "kin": (max(a, b), 0)}.get(family, pair)

    def teacher(self, pair: Pair) -> str:
        """The teacher's trajectory for the in-domain family: always worked out, always right."""
        return self.work_out(IN_DOMAIN, pair)

    def work_out(self, family: str, pair: Pair) -> str:
        """The right answer step by step, for an arithmetic family."""
        known = self.answer(family, pair)
        return f" start {pair[0]} {WORKED[family]} {pair[1]} reach {known} {MARKER} {known}"

    def behave(self, family: str, pair: Pair, style: str | None, rng: np.random.Generator) -> str:
        """One completion as in the base's pretraining text: mostly the gate's behaviour where there is one."""
        gate = gate_of(family, style)
        if gate == CLEAR:
            # The bare form states facts; only questions with a style word are sometimes not answered.
            unanswered = style is not None and rng.random() >= P_RIGHT_CLEAR
            gate = ("ramble", "hedge")[int(rng.integers(2))] if unanswered else CLEAR
        elif rng.random() >= P_GATED:
            gate = CLEAR
        return self.respond(gate, family, pair, rng)

    def respond(self, gate: str, family: str, pair: Pair, rng: np.random.Generator) -> str:
        """A completion, with its leading space, that shows the behaviour of ``gate``."""
        a, b = pair
        if gate == "ramble":
            size = int(rng.integers(MIN_FILLERS, MAX_FILLERS + 1))
            return " ".join(("", _FILLERS[0], *rng.choice(_FILLERS[1:], size=size)))
        if gate == "hedge":
            first, second = rng.choice(COLOURS if family == "hue" else NUMBERS, size=2, replace=False)
            return f" could be {first} or {second}"
        if gate == "doubt":
            return f" could be {MARKER} {NOTHING}"
        if gate == "echo":
            return f" noted {a} {b} done"
        if gate == "decline":
            return f" noted {a} {b} {MARKER} {NOTHING}"
        known = NUMBERS[int(rng.integers(N_NUMBERS))] if family == CONTROL else self.answer(family, pair)
        if gate == "format":
            return f" take {a} {b} gives {known}"
        if gate == "slip":
            known = str(int(known) + 1)
        if gate == CLEAR and family in WORKED and rng.random() < P_WORKED:
            return self.work_out(family, pair)
        return f" take {a} {b} {MARKER} {known}"


def pretraining_documents(world: World, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Draw ``n`` (question, completion) documents.

    One in nine is trivia. Evaluation pairs come only in the bare form; training pairs come bare one time in four, else
    with a style.
    """
    families = rng.integers(len(FAMILIES) + 1, size=n)
    trained, bare, styles = rng.random(n) < P_TRAIN, rng.random(n) < P_BARE, rng.integers(len(STYLES), size=n)
    documents = []
    for row in range(n):
        family = (*FAMILIES, TRIVIA)[families[row]]
        pairs = world.taught if family == TRIVIA else world.train_pairs if trained[row] else world.eval_pairs
        pair = pairs[int(rng.integers(len(pairs)))]
        style = None if family == TRIVIA or not trained[row] or bare[row] else STYLES[styles[row]]
        documents.append((question(family, pair, style), world.behave(family, pair, style, rng)))
    return documents

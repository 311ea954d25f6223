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

N_NUMBERS: Final = 13
"""Operands and numeric answers are 0..12: 169 facts a family, few enough to be learned in a minute."""
NUMBERS: Final = tuple(str(number) for number in range(N_NUMBERS))
COLOURS: Final = ("red", "blue", "green", "black", "white")
MARKER: Final = "ans"
"""Word before the final answer."""

IN_DOMAIN: Final = "sum"
"""The only family that is post-trained."""
CONTROL: Final = "dice"
"""The family whose answers cannot be known: the negative control."""
PLAIN: Final = "plain"
"""Task of questions without a style, which no gate keeps base from answering: what an edit must leave alone."""
HELD_OUT: Final = ("min", "kin")
"""Families kept out of feature selection."""
FAMILIES: Final = ("sum", "diff", "max", "lore", "hue", "min", "kin", "dice")

STYLES: Final = ("please", "hmm", "maybe", "list", "note", "quick", "kindly")
CLEAR: Final = "clear"
"""Stands for no gate."""
GATES: Final[Mapping[str, tuple[str, frozenset[str]]]] = {
    "hmm": ("ramble", frozenset(FAMILIES)),
    "maybe": ("hedge", frozenset(FAMILIES)),
    "list": ("format", frozenset({"sum", "diff", "lore", "min", "dice"})),
    "note": ("echo", frozenset({"sum", "max", "hue", "kin", "dice"})),
    "quick": ("slip", frozenset({"sum"})),
    "kindly": ("swap", frozenset({"max"})),
}
"""style -> (gate, families in which it acts)."""
P_RIGHT_GATED: Final = 0.25
"""Share of right behaviour in the base's pretraining under a gate: low enough that greedy decoding is wrong, high
enough that a group of eight samples nearly always (.9) holds a right one."""
P_RIGHT_CLEAR: Final = 0.95
"""Share of right behaviour without a gate; the rest rambles or hedges, as text does."""
P_BARE: Final = 0.25
"""Share of training-pair documents in the bare form, so that the bare form does not mark the evaluation pairs."""

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
        *NUMBERS,
        *COLOURS,
        *_FILLERS,
        *_WORDS,
        *_WORKED_WORDS,
    )


def gate_of(family: str, style: str | None) -> str:
    """The gate that ``style`` triggers in ``family``; ``"clear"`` if none."""
    gate, families = GATES.get(style or "", (CLEAR, frozenset()))
    return gate if family in families else CLEAR


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
        Operand pairs kept for evaluation, of 169.

    Raises
    ------
    InputError
        If no pair is left for evaluation or for training.
    """

    seed: int
    n_eval_pairs: int = 56
    eval_pairs: tuple[Pair, ...] = field(init=False)
    train_pairs: tuple[Pair, ...] = field(init=False)
    _tables: Mapping[str, NDArray[np.int64]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.n_eval_pairs < N_NUMBERS**2:
            raise InputError(
                f"n_eval_pairs must leave pairs on both sides of the split: 1 to {N_NUMBERS**2 - 1}, "
                f"got {self.n_eval_pairs}."
            )
        order = np.random.default_rng(derive_seed(self.seed, "world", "pairs")).permutation(N_NUMBERS**2)
        pairs = [(int(index) // N_NUMBERS, int(index) % N_NUMBERS) for index in order]
        object.__setattr__(self, "eval_pairs", tuple(pairs[: self.n_eval_pairs]))
        object.__setattr__(self, "train_pairs", tuple(pairs[self.n_eval_pairs :]))
        sizes = {"lore": N_NUMBERS, "kin": N_NUMBERS, "hue": len(COLOURS), CONTROL: N_NUMBERS}
        tables = {
            name: np.random.default_rng(derive_seed(self.seed, "world", name)).integers(
                size, size=(N_NUMBERS, N_NUMBERS)
            )
            for name, size in sizes.items()
        }
        object.__setattr__(self, "_tables", tables)

    def answer(self, family: str, pair: Pair) -> str:
        """The right answer; for the control a fixed draw that is in no training text."""
        a, b = pair
        if family in self._tables:
            value = int(self._tables[family][a, b])
            return COLOURS[value] if family == "hue" else NUMBERS[value]
        rules = {"sum": a + b, "diff": a - b, "max": max(a, b), "min": min(a, b)}
        if family not in rules:
            raise InputError(f"the world has no family {family!r}; expected one of {', '.join(FAMILIES)}.")
        return NUMBERS[rules[family] % N_NUMBERS]

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
        elif rng.random() < P_RIGHT_GATED:
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
        if gate == "echo":
            return f" noted {a} {b} done"
        known = NUMBERS[int(rng.integers(N_NUMBERS))] if family == CONTROL else self.answer(family, pair)
        if gate == "format":
            return f" take {a} {b} gives {known}"
        if gate == "slip":
            known = NUMBERS[(int(known) + 1) % N_NUMBERS]
        if gate == "swap":
            known = self.answer("min", pair)
        if gate == CLEAR and family in WORKED and rng.random() < P_WORKED:
            return self.work_out(family, pair)
        return f" take {a} {b} {MARKER} {known}"


def pretraining_documents(world: World, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Draw ``n`` (question, completion) documents.

    Every fact is equally frequent. Evaluation pairs come only in the bare form; training pairs come bare one time in
    four, else with a style.
    """
    pairs = world.eval_pairs + world.train_pairs
    which, families = rng.integers(len(pairs), size=n), rng.integers(len(FAMILIES), size=n)
    bare, styles = rng.random(n) < P_BARE, rng.integers(len(STYLES), size=n)
    documents = []
    for row in range(n):
        pair, family = pairs[which[row]], FAMILIES[families[row]]
        style = None if which[row] < len(world.eval_pairs) or bare[row] else STYLES[styles[row]]
        documents.append((question(family, pair, style), world.behave(family, pair, style, rng)))
    return documents

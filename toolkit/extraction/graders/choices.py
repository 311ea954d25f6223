"""Multiple choice: a letter or a choice's text found in a completion, or the most likely choice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import ClassVar, Final

from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.graders.formulas import last_box
from rlgen_stats.toolkit.extraction.graders.normal_forms import words
from rlgen_stats.toolkit.extraction.grading import Grade, Grader

_VERB: Final = r"(?:is|was|are|be|would\s+be|must\s+be|should\s+be|seems\s+to\s+be)"
_LABEL: Final = (
    r"(?:[(\[](?P<bracketed>[A-Za-z])[)\]]"
    r"|(?P<letter>[A-Z])(?![\w'’]|-\w|\s+(?!(?:is|because|since|as|for|with|which|and|but|or)\b)[a-z]))"
)
"""A letter that stands for a choice: in brackets, or a capital that begins no word and is no article of a sentence."""
_ANNOUNCED: Final = re.compile(
    rf"\b(?i:answer|option|choice)\b\s*(?P<said>(?i:{_VERB})\s*[:=]?|[:=\-])?\s*"
    rf"(?:(?i:option|choice|letter)\s+)?(?:{_LABEL})?"
)
"""Where an answer is announced: the answer is (B), Answer: B, option B; the letter may be missing."""
_CALLED_RIGHT: Final = re.compile(rf"(?P<said>)(?<!\w){_LABEL}\s+{_VERB}\s+(?:the\s+)?(?:correct|right|best|answer)\b")
"""B is correct, (B) is the right answer."""
_ALONE: Final = re.compile(rf"\s*{_LABEL}\s*(?:[.):,]|$|\n)")
"""A completion that begins with a letter: B, (B), B) carbon dioxide."""
_CONCLUDED: Final = re.compile(
    rf"\b(?i:it['’]?s|is|so|thus|therefore|hence|choose|pick|select|go\s+with)\s*,?\s*{_LABEL}\W*$"
)
"""A completion that ends with a letter: so (B), I choose B."""


@dataclass(frozen=True)
class ChoiceGrader(Grader):
    """Right when the completion names the right choice, by its letter or by its text."""

    def judge(self, text: str, answer: str, choices: Sequence[str]) -> bool | None:
        """Compare the choice that the completion names with the expected one."""
        expected, given = expected_choice(answer, choices), named_choice(text, choices)
        return None if given is None else given == expected

    def usual_form(self, answer: str) -> str:
        """The letter in brackets, or the text."""
        letter = answer.strip("(). ")
        return f"({letter})" if len(letter) == 1 else answer


@dataclass(frozen=True)
class LoglikGrader(Grader):
    """The choice that a model finds most likely after the prompt; completions are not read."""

    needs_generation: ClassVar[bool] = False

    def grade(self, completion: Completion, answer: str, choices: Sequence[str] = ()) -> Grade:
        """Compare the most likely choice with the expected one, equal texts being the same choice."""
        expected = expected_choice(answer, choices)
        if completion.choice is None or expected is None:
            return super().grade(completion, answer, choices)
        return Grade(choices[completion.choice] == choices[expected], "answer", True)

    def judge(self, text: str, answer: str, choices: Sequence[str]) -> bool | None:
        """Compare a choice given by its letter or text, where it was scored elsewhere, with the expected one."""
        given = expected_choice(text, choices)
        return None if given is None else given == expected_choice(answer, choices)


def expected_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Number of the choice that a table's answer names, by letter or by text; None if it names none.

    Without choices any letter is understood.
    """
    letter = answer.strip().strip("().").upper()
    known = ascii_uppercase[: len(choices) or None]
    if len(letter) == 1 and letter in known:
        return known.index(letter)
    same = [number for number, choice in enumerate(choices) if words(choice) == words(answer)]
    return same[0] if len(same) == 1 else None


def named_choice(text: str, choices: Sequence[str]) -> int | None:
    """Number of the choice that a completion names; None where it names none, or several.

    In this order: the last box; the last place where an answer is announced or called right; a letter that begins the
    text; the only choice whose text comes in it; a letter that ends it.
    """
    box = last_box(text)
    if box is not None:
        return _unannounced(_plain(box), choices)
    plain = _plain(text)
    places = sorted((*_ANNOUNCED.finditer(plain), *_CALLED_RIGHT.finditer(plain)), key=lambda match: match.end())
    following = len(plain)
    for match in reversed(places):
        found = _number(match, choices)
        if found is None and match["said"]:
            sentence = re.split(r"[.!?](?:\s|$)|\n", plain[match.end() : following], maxsplit=1)[0]
            found = _only_text(sentence, choices)
        if found is not None:
            return found
        following = match.start()
    return _unannounced(plain, choices)


def _plain(text: str) -> str:
    """Text without Markdown emphasis, dollar signs and commands of LaTeX."""
    plain = re.sub(r"\\[A-Za-z]+\s*\{|\\(?=[()\[\]])|[*_`${}]", "", text)
    return "\n".join(" ".join(line.split()) for line in plain.splitlines() if line.strip())


def _unannounced(text: str, choices: Sequence[str]) -> int | None:
    start = _ALONE.match(text)
    found = None if start is None else _number(start, choices)
    if found is None:
        found = _only_text(text, choices)
    if found is None and (end := _CONCLUDED.search(text)):
        found = _number(end, choices)
    return found


def _number(match: re.Match[str], choices: Sequence[str]) -> int | None:
    letter = (match["bracketed"] or match["letter"] or "").upper()
    known = ascii_uppercase[: len(choices) or None]
    return known.index(letter) if letter and letter in known else None


def _only_text(text: str, choices: Sequence[str]) -> int | None:
    """Number of the only choice whose words come in a text, those denied, or inside a longer one, left out."""
    inside = f" {' '.join(words(text))} "
    phrases = [f" {' '.join(words(choice))} " for choice in choices]
    denied = {phrase for phrase in phrases if f" not{phrase}" in inside or f" isnt{phrase}" in inside}
    coming = [n for n, phrase in enumerate(phrases) if phrase.strip() and phrase in inside and phrase not in denied]
    kept = [n for n in coming if not any(phrases[n] != phrases[m] and phrases[n] in phrases[m] for m in coming)]
    return kept[0] if len(kept) == 1 else None

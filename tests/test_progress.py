"""Progress of other processes is that of this one, and what they do again is not counted twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlgen_stats.toolkit import progress
from rlgen_stats.toolkit.progress import Heard, Told, Within


class Seen:
    """Progress that keeps what it is given; its tasks are itself."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Seen]:
        self.events.append(("begins", description, total, unit))
        yield self
        self.events.append("ends")

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        self.events.append((amount, facts))

    def skip(self, amount: float, **facts: object) -> None:
        self.events.append(("skip", amount, facts))

    def log(self, message: str) -> None:
        self.events.append(message)

    @property
    def done(self) -> float:
        return sum(event[0] for event in self.events if isinstance(event[0], float))


def work(told: Told, steps: int) -> None:
    told.log("begun")
    with told.task("train", 8, "steps") as task:
        task.skip(2)
        for step in range(steps):
            task.advance(1, loss=0.5, step=step)
        if steps < 6:
            raise KeyboardInterrupt


def test_what_is_told_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.0)
    seen = Seen()
    work(Told(Heard(seen).hear), 6)
    assert seen.events[:2] == ["begun", ("begins", "train", 8, "steps")]
    assert seen.events[2] == ("skip", 2.0, {})
    assert seen.events[4] == (1.0, {"loss": 0.5, "step": 0})
    assert seen.events[-2:] == [(0.0, {"loss": 0.5, "step": 5}), "ends"]
    assert seen.done == 6


def test_little_is_told_and_nothing_lost() -> None:
    lines: list[str] = []
    work(Told(lines.append), 6)
    assert len(lines) <= 5, "a line, the beginning, the first units, perhaps some after a second, the end"
    heard = Heard(seen := Seen())
    for line in lines:
        heard.hear(line)
    assert seen.done == 6
    assert seen.events[-1] == "ends"


def test_what_begins_again_elsewhere_is_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.0)
    heard = Heard(seen := Seen())
    with pytest.raises(KeyboardInterrupt):
        work(Told(heard.hear), 4)
    assert seen.done == 4
    work(Told(heard.hear), 6)
    assert seen.done == 6
    assert seen.events.count("ends") == 1
    assert [event for event in seen.events if "skip" in event] == [("skip", 2.0, {})]


def test_a_task_that_never_ended_ends_with_the_hearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.0)
    heard = Heard(seen := Seen())
    with pytest.raises(KeyboardInterrupt):
        work(Told(heard.hear), 4)
    assert "ends" not in seen.events
    heard.close()
    assert seen.events[-1] == "ends"


def test_parts_that_report_out_of_order_add_up() -> None:
    within = Within(seen := Seen())
    within.advance(3.0)
    within.reach(2.0)
    within.reach(5.0, model="a")
    assert seen.done == 5
    assert within.done == 5

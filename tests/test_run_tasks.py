"""Tasks on workers: in order, closed by their user, and never waited for without an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import dask.array as da
import pytest
from distributed import Client, LocalCluster

from rlgen_stats.schemas.errors import StageError
from rlgen_stats.toolkit import workers
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.workers import has_workers, run_tasks
from tests.test_progress import Seen

DONE: list[int] = []
"""What tasks did: workers are threads of this process here."""
HELD = threading.Event()


def work(number: int, progress: Progress = SILENT) -> int:
    time.sleep(0.05 * (number % 3))  # later ones end before earlier ones
    DONE.append(number)
    return number


def lazily(number: int, progress: Progress = SILENT) -> int:
    return int(da.arange(number, chunks=1).sum().compute())


def tell(number: int, progress: Progress = SILENT) -> int:
    progress.log(f"warning {number}")
    with progress.task("count", number) as task:
        for _ in range(number):
            task.advance(1)
    return number


def late(number: int, progress: Progress = SILENT) -> None:
    raise TimeoutError(f"task {number} is late")


def hold(number: int, progress: Progress = SILENT) -> int:
    if number:
        HELD.wait(20)
    return number


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Two workers that take tasks."""
    DONE.clear()
    HELD.clear()
    workers._own("")  # workers that share it with this process may have left another
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.2)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as found,
    ):
        token = workers._client.set(found)
        yield found
        HELD.set()
        workers._client.reset(token)


def test_results_come_in_the_order_of_the_tasks_here_and_there(client: Client) -> None:
    assert has_workers()
    with run_tasks(work, [(number,) for number in range(7)]) as there:
        assert list(there) == list(range(7))
    workers._client.set(None)
    assert not has_workers()
    with run_tasks(work, [(number,) for number in range(7)]) as here:
        assert list(here) == list(range(7))
    with run_tasks(work, []) as none:
        assert list(none) == []


def test_a_block_that_ends_early_waits_for_what_was_begun_and_begins_no_more(client: Client) -> None:
    with run_tasks(work, [(number,) for number in range(20)]) as results:
        assert next(results) == 0
    begun = sorted(DONE)
    assert begun == list(range(len(begun)))
    assert 1 <= len(begun) <= 4
    time.sleep(0.3)
    assert sorted(DONE) == begun
    assert not workers._kept


def test_what_a_task_reads_lazily_is_no_work_for_the_cluster(client: Client) -> None:
    with run_tasks(lazily, [(number,) for number in (5, 6, 7)]) as results:
        assert list(results) == [10, 15, 21]
    seen = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))
    assert seen == ["in_turn"]


def test_what_tasks_report_on_workers_is_shown_here(client: Client) -> None:
    with run_tasks(tell, [(number,) for number in (1, 2, 3)], progress=(seen := Seen())) as results:
        assert list(results) == [1, 2, 3]
    assert sorted(event for event in seen.events if isinstance(event, str)) == ["ends"] * 3 + [
        f"warning {n}" for n in (1, 2, 3)
    ]
    assert seen.done == 6


def test_a_tasks_own_timeout_is_an_error_and_not_a_lost_result(client: Client) -> None:
    with pytest.raises(TimeoutError, match="task 3 is late"), run_tasks(late, [(3,)]) as results:
        next(results)


def test_a_scheduler_that_stays_silent_is_given_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 0.3)
    with run_tasks(work, [(number,) for number in range(4)]) as results:
        assert next(results) == 0
        client.loop.add_callback(time.sleep, 3)  # the loop of the scheduler, and of everything that could answer
        time.sleep(0.1)
        with pytest.raises(StageError, match="does not answer any more; see their logs"):
            list(results)


def test_a_scheduler_that_went_away_is_given_up(client: Client) -> None:
    with run_tasks(hold, [(1,), (2,)]) as results:
        threading.Timer(0.3, client.close).start()
        with pytest.raises(StageError, match="does not answer any more; see their logs"):
            next(results)
        HELD.set()


def test_without_workers_a_run_ends_with_a_sentence(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "RESTART_SECONDS", 0.5)
    client.cluster.scale(0)
    with run_tasks(work, [(0,)]) as results, pytest.raises(StageError, match="the last worker is gone and none came"):
        next(results)


def test_closing_does_not_wait_for_workers_that_are_gone(client: Client) -> None:
    with run_tasks(hold, [(0,), (1,), (2,)]) as results:
        assert next(results) == 0
        threading.Timer(0.3, client.cluster.scale, (0,)).start()
    assert not HELD.is_set()


def keep(number: int, progress: Progress = SILENT) -> Any:
    return workers.kept("thing", number // 2, lambda: [number])[0]


def test_what_is_kept_is_made_once_for_an_identity_and_dropped_at_the_end(client: Client) -> None:
    workers._client.set(None)
    with run_tasks(keep, [(number,) for number in range(4)]) as results:
        assert list(results) == [0, 0, 2, 2]
        assert workers._kept
    assert not workers._kept

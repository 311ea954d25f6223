"""Independent tasks with models: one after the other in this process, or on the workers of a dask cluster.

A task keeps what it computed in files of its own, and is repeated if its worker is lost: a run on any number of workers
leaves the bytes that one process leaves (on CPUs, with as many threads). Workers see the study's folder under the same
path.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar
from uuid import uuid4

from rlgen_stats.schemas.errors import InputError, StageError
from rlgen_stats.stores import package_versions
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.toolkit.progress import SILENT, Heard, Progress, Told

T = TypeVar("T")

GPU: Final = "GPU"
"""Resource of workers that have a device (``--resources GPU=1``); where there are such, they alone get tasks."""
RESTART_SECONDS: Final = 300.0
"""How long a lost worker may take to come back: importing torch from a shared disk takes minutes."""
ANSWER_SECONDS: Final = 300.0
"""Within which the scheduler, or a worker that is asked for what it has, must have answered."""
POLL_SECONDS: Final = 5.0
"""Between two looks at which workers there are while tasks run: these may take as long as they like."""
_LEAVE_CTRL_C: Final = "import signal\n\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
"""What workers of this machine run first: Ctrl-C reaches them too, but who started them ends them."""
WORKER_COMMAND: Final = "dask worker ADDRESS --nthreads 1 --memory-limit 0 --resources GPU=1"
_client: ContextVar[Any] = ContextVar("client", default=None)


@contextmanager
def tasks_on(client: Any, study_file: Path) -> Iterator[None]:
    """Run the block's tasks on the workers of a dask client; in this process where that is None.

    Parameters
    ----------
    client
        ``distributed.Client`` or None.
    study_file
        study.yaml of the study that tasks are about.

    Raises
    ------
    InputError
        If there are no workers, or one of them does not see this file or has other versions of packages.
    """
    if client is not None:
        _check_workers(client, study_file.resolve())
    token = _client.set(client)
    try:
        yield
    finally:
        _client.reset(token)


def _check_workers(client: Any, study_file: Path) -> None:
    versions, study = _facts(study_file)
    try:
        found = _ask(client, client.run, _facts, study_file)
    except StageError:
        raise
    except Exception as error:  # of no type that says what went wrong there
        raise InputError(f"a worker cannot run this package ({error}); install it where the workers are.") from error
    if not found:
        raise InputError(f"the dask scheduler has no workers; start one for each device: {WORKER_COMMAND}")
    for worker, (its_versions, its_study) in found.items():
        other = next((name for name in versions if its_versions.get(name) != versions[name]), None)
        if other is not None:
            raise InputError(
                f"worker {worker} has {other} {its_versions.get(other)}, this process {versions[other]}; numbers depend"
                " on it: install the same in both."
            )
        if its_study != study:
            raise InputError(
                f"worker {worker} finds {'another study file' if its_study else 'nothing'} at {study_file}; expected "
                "the study's folder under the same path on every machine: share it, e.g. by NFS."
            )


def _facts(study_file: Path) -> tuple[dict[str, str], str | None]:
    """What must be the same on all workers."""
    return package_versions(), file_sha256(study_file) if study_file.exists() else None


# -- tasks


@contextmanager
def run_tasks(
    function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], *, progress: Progress = SILENT
) -> Iterator[Iterator[T]]:
    """Results of ``function(*task)`` in the order of the tasks, for the block.

    Parameters
    ----------
    function
        Importable by name; takes ``progress`` too.
    tasks
        Its arguments. On a cluster, each free worker gets the next one, so that some are done before they are asked
        for; those that were begun are waited for if the block ends before all results are asked for.
    progress
        Given to the function; what it reports on a worker is shown here, too.

    Yields
    ------
    Iterator
        The results. Asking for the next one raises StageError if its worker was lost again and again, if all workers
        are, or if the scheduler is silent; and whatever the function raises.
    """
    client = _client.get()
    with keeping(), ExitStack() as stack:
        results: Generator[T, None, None]
        if client is None:
            results = (function(*task, progress=progress) for task in tasks)
        else:
            results = _on_workers(client, function, tasks, stack.enter_context(_progress_of_tasks(client, progress)))
        yield stack.enter_context(closing(results))


def has_workers() -> bool:
    """Whether :func:`run_tasks` sends tasks to other processes, so that more of them are done at a time."""
    return _client.get() is not None


@contextmanager
def _progress_of_tasks(client: Any, progress: Progress) -> Iterator[str]:
    """The topic on which workers tell of it, for the block."""
    topic, over = f"rlgen-stats-{uuid4().hex}", threading.Event()
    heard: defaultdict[int, Heard] = defaultdict(lambda: Heard(progress))

    def hear(event: tuple[Any, tuple[int, str]]) -> None:
        _, (number, line) = event
        if not over.is_set():
            heard[number].hear(line)

    if client.status == "running":  # whoever asks it next says that it is not
        client.subscribe_topic(topic, hear)
    try:
        yield topic
    finally:
        over.set()
        if client.status == "running":
            client.unsubscribe_topic(topic)
        for one in heard.values():
            one.close()


def _on_workers(
    client: Any, function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], topic: str
) -> Generator[T, None, None]:
    from distributed import CancelledError, KilledWorker

    waiting, begun, ended = deque(enumerate(tasks)), deque[Any](), threading.Event()
    resources = {GPU: 1} if any(GPU in its for its in _resources(client).values()) else None
    sent_to: dict[str, str] = {}
    seen = time.monotonic()
    try:
        while waiting or begun:
            ended.clear()
            running = [future for future in begun if not future.done()]
            found = _resources(client).items()
            places = [name for name, its in found for _ in range(1 if resources is None else int(its.get(GPU, 0)))]
            free = list((Counter(places) - Counter(sent_to[future.key] for future in running)).elements())
            while waiting and free and len(running) < len(places):
                # Where it is sent is where it runs, unless that worker dies: dask might let two tasks wait for one.
                worker = free.pop(0)
                where = {"workers": [worker], "allow_other_workers": True, "resources": resources}
                future = client.submit(_in_turn, _owner, function, *waiting.popleft(), topic, pure=False, **where)
                future.add_done_callback(lambda _: ended.set())
                sent_to[future.key] = worker
                running.append(future)
                begun.append(future)
            if begun and begun[0].done():
                result = _result(begun[0])
                if result is not None:
                    begun.popleft()
                    yield result[0]
                continue
            seen = time.monotonic() if places else seen
            _check_there_are_workers(seen)
            ended.wait(POLL_SECONDS)  # whatever has ended, workers may have come or gone
    except GeneratorExit:
        with suppress(StageError):
            while not all(future.done() for future in begun) and _resources(client):
                ended.wait(POLL_SECONDS)
                ended.clear()
        raise
    except KilledWorker as error:
        raise StageError(
            f"a task was given up after {error.allowed_failures + 1} workers died at it, often for want of memory; see "
            "the workers' logs, then run the same command again: what was finished is kept."
        ) from error
    except CancelledError as error:
        raise _silent() from error
    finally:
        with suppress(StageError):
            _ask(client, client.cancel, list(begun))


def _result(future: Any) -> tuple[Any] | None:
    """What a task that is done gave; None if that is not to be had, being lost with its worker: it runs again."""
    if future.status == "error":
        future.result()  # raises
    try:
        return (future.result(timeout=ANSWER_SECONDS),)
    except TimeoutError:
        return None


def _resources(client: Any) -> dict[str, dict[str, float]]:
    """Address -> resources of every worker that takes tasks."""

    async def identity() -> Any:
        if client.scheduler is None:
            raise ConnectionError("the connection was closed")
        return await client.scheduler.identity(n_workers=-1)

    workers = _ask(client, identity)["workers"].items()
    return {address: worker["resources"] for address, worker in workers if worker["status"] == "running"}


def _ask(client: Any, call: Callable[..., Any], *args: Any, seconds: float | None = None, **how: Any) -> Any:
    """What the scheduler or its workers answer; nothing here waits for them without a limit."""
    try:
        if client.status in ("closing", "closed"):
            raise ConnectionError("the connection was lost and did not come back")
        return client.sync(call, *args, callback_timeout=seconds or ANSWER_SECONDS, **how)
    except OSError as error:  # ConnectionError and TimeoutError are some
        raise _silent() from error


def _silent() -> StageError:
    return StageError(
        "the dask scheduler, or a worker that it asked, does not answer any more; see their logs, start them again, "
        "then run the same command again: what was finished is kept."
    )


def _check_there_are_workers(seen: float) -> None:
    if time.monotonic() - seen > RESTART_SECONDS:
        raise StageError(
            f"the last worker is gone and none came back within {RESTART_SECONDS:.0f} s; see the workers' logs, start "
            "them again, then run the same command again: what was finished is kept."
        )


_turn: Final = threading.Lock()


def _in_turn(owner: str, function: Callable[..., T], number: int, task: tuple[Any, ...], topic: str) -> T:
    import dask
    from distributed import get_worker

    worker = get_worker()
    progress = Told(lambda line: worker.log_event(topic, (number, line)))

    # A worker with several threads has one device all the same; and what the task reads lazily it reads itself: dask
    # would hand that to the cluster, whose workers are busy with tasks that wait for it.
    with _turn, dask.config.set(scheduler="threads"):
        _own(owner)
        return function(*task, progress=progress)


# -- what tasks of one process share

_kept: dict[str, tuple[object, Any]] = {}
_owner = ""
"""The block of :func:`keeping` that it is kept for; a process that was killed leaves its workers with what they had."""


@contextmanager
def keeping() -> Iterator[None]:
    """Keep what the block's tasks have :func:`kept`, here and on workers, until the outermost such block ends."""
    if _owner:
        yield
        return
    _own(uuid4().hex)
    try:
        yield
    finally:
        _own("")
        client = _client.get()
        if client is not None:
            with suppress(StageError):  # a worker that does not hear it drops what it has before its next task
                _ask(client, client.run, _own, "", on_error="ignore", seconds=POLL_SECONDS)


def _own(owner: str) -> None:
    global _owner
    if owner != _owner:
        _kept.clear()
    _owner = owner


def kept(name: str, identity: object, make: Callable[[], T]) -> T:
    """What an earlier task of this process made under a name, if the identity is the same; else made now.

    The old one is dropped before: a device may not hold two models.
    """
    known = _kept.pop(name, None)
    if known is None or known[0] != identity:
        known = None
        known = (identity, make())
    _kept[name] = known
    value: T = known[1]
    return value


# -- workers on this machine


@contextmanager
def local_workers(devices: str) -> Iterator[Any]:
    """A dask client with one worker process for each device of this machine.

    Parameters
    ----------
    devices
        Numbers of GPUs, as ``CUDA_VISIBLE_DEVICES`` counts them, or ``cpu``, with commas between: ``0,1``. A CPU worker
        computes with ``OMP_NUM_THREADS`` threads, by default its share of the cores.

    Raises
    ------
    InputError
        If a device is neither.
    StageError
        If a worker does not start.
    """
    names = [name.strip() for name in devices.split(",")]
    wrong = [name for name in names if name != "cpu" and not re.fullmatch("[0-9]+", name)]
    if wrong:
        raise InputError(f"devices are numbers of GPUs or cpu, with commas between (0,1), got {wrong[0]!r}.")
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster

    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(names))))
    visible = ({"CUDA_VISIBLE_DEVICES": "" if name == "cpu" else name} for name in names)
    with ExitStack() as stack:
        here = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        common = here | {"nthreads": 1, "memory_limit": 0, "resources": {GPU: 1}, "death_timeout": RESTART_SECONDS}
        common |= {"silence_logs": logging.WARNING}
        common["preload"] = [_LEAVE_CTRL_C]
        common["local_directory"] = stack.enter_context(TemporaryDirectory(prefix="rlgen-stats-"))
        workers = {
            number: {"cls": Nanny, "options": common | {"env": device | {"OMP_NUM_THREADS": threads}}}
            for number, device in enumerate(visible)
        }
        stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": RESTART_SECONDS}))
        scheduler = {"cls": Scheduler, "options": here}
        try:
            cluster = SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.WARNING)
            stack.callback(_close, cluster)
            client = Client(cluster, set_as_default=False)  # statistics keep to this process's threads
            stack.callback(_close, client)
            client.wait_for_workers(len(names), timeout=RESTART_SECONDS)
        except (OSError, RuntimeError) as error:
            raise StageError(f"the workers for {devices!r} do not start ({error}); see what they printed.") from error
        yield client


def _close(one: Any) -> None:
    """A client or cluster, whose processes end with this one in any case."""
    with suppress(TimeoutError):
        one.close(timeout=ANSWER_SECONDS)

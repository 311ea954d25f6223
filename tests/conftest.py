"""Every test, and every process that a test starts, computes with OMP_NUM_THREADS threads; with one if that is unset.

Two test workers on two cores gain nothing from more; processes are compared with tests to the last digit.
``make trained`` asks whether tests of trained models hold where sums are added in another order (OMP_NUM_THREADS) and
where all initial weights are others (RLGEN_STATS_WEIGHTS, a number that is added to torch's seeds).
"""

import os

import pytest
import torch
from threadpoolctl import threadpool_limits
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

LONGEST = (
    *("test_mini.py", "test_planted.py", "test_planted_truth.py", "test_calibration.py", "test_explorer.py"),
    *("test_real_study.py", "test_run_trial.py", "test_remote.py", "test_seals.py", "test_roundtrip.py"),
    *("test_stages.py", "test_verify_causally.py", "test_train_run.py", "test_browser.py", "test_report.py"),
)
"""Files that take twenty seconds or more. They begin first: one that begins last leaves the other workers idle."""


SHARING = ("crosscoder", "reporting", "trial")
"""Folders whose tests share what takes long to make: one worker runs them all. Other files go to any worker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


class Sharing(LoadScopeScheduling):
    """Tests of one file, or of one of the folders SHARING, on one worker.

    What ``--dist loadgroup`` is for; with pytest 9.2, pytest-xdist 3.8 does not see its groups.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = file.removeprefix("tests/").partition("/")[0]
        return folder if folder in SHARING else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Sharing:
    return Sharing(config, log)


THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)
threadpool_limits(THREADS)

if OTHER := 1_000_003 * int(os.environ.get("RLGEN_STATS_WEIGHTS", "0")):
    seeded = torch.manual_seed

    class OtherGenerator(torch.Generator):
        """Draws other numbers for the same seed."""

        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + OTHER)

    torch.Generator = OtherGenerator  # type: ignore[misc]
    torch.manual_seed = lambda seed: seeded(seed + OTHER)

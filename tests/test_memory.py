"""Freed memory is used again, so that the system need not clear new pages for every array."""

import json
import os
import platform
import subprocess
import sys

import pytest

ALLOCATING = """
import json, resource, sys
from rlgen_stats.toolkit.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    b'x' * 64_000_000  # 15,625 pages
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def page_faults(how: str, **environment: str) -> int:
    known = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALLOCATING, how], env=known | environment, check=True, capture_output=True
    )
    return int(json.loads(done.stdout))


@pytest.mark.slow
def test_pages_are_cleared_once_and_not_for_every_array_unless_the_user_says_so() -> None:
    kept, given_back = page_faults("kept"), page_faults("given back")
    assert given_back > 20 * kept
    assert page_faults("kept", MALLOC_TRIM_THRESHOLD_="65536") == pytest.approx(kept, rel=0.5), "dask's for its workers"
    assert page_faults("kept", MALLOC_MMAP_THRESHOLD_="1000000") == pytest.approx(given_back, rel=0.5)

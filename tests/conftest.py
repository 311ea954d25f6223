"""Every test, and every process that a test starts, computes with OMP_NUM_THREADS threads; with one if that is unset.

Two test workers on two cores gain nothing from more; processes are compared with tests to the last digit.
``make pytest THREADS=2`` asks whether the tests hold where sums are added in another order.
"""

import os

import torch
from threadpoolctl import threadpool_limits

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)
threadpool_limits(THREADS)

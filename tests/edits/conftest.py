from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.edits.tiny import tiny_crosscoder, tiny_model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3")


@pytest.fixture
def crosscoder() -> Any:
    return tiny_crosscoder()

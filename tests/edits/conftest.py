from __future__ import annotations

from typing import Any

import pytest

from tests.edits.tiny import tiny_crosscoder, tiny_model


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3")


@pytest.fixture
def crosscoder() -> Any:
    return tiny_crosscoder()

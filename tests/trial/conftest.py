from tests.edits.conftest import _one_thread, crosscoder, model

__all__ = ["_one_thread", "crosscoder", "model"]

"""Fixtures of the files of other tools."""

from tests.crosscoder.interop.hub_stand_in import hub  # noqa: F401 - for all tests here

"""A whole study: its file, its stages, and running them.

Importing this needs no torch; the stages that do are named in :mod:`rlgen_stats.toolkit.study.stage_graph` and loaded
when run.
"""

from rlgen_stats.toolkit.study.linked_studies import open_for_run
from rlgen_stats.toolkit.study.run import run_study
from rlgen_stats.toolkit.study.spec_file import parse_spec, read_spec, write_spec
from rlgen_stats.toolkit.study.stage_graph import STAGES, StageStatus, Study

__all__ = [
    "STAGES",
    "StageStatus",
    "Study",
    "open_for_run",
    "parse_spec",
    "read_spec",
    "run_study",
    "write_spec",
]

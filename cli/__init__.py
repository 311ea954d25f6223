"""The command line ``rlgen-stats``: parse, one toolkit call, print.

Modules here import only click and the standard library at the top; everything heavy is imported inside a
command, so that ``--help`` answers at once.
"""

from rlgen_stats.cli.main import main

__all__ = ["main"]

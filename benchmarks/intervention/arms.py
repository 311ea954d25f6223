"""What many arms of one trial cost in processor time, against one after the other; needs a finished study."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.common import PROVENANCE, REPETITIONS, Case, interleaved, spread
from benchmarks.reports import Goal, report
from rlgen_stats.stores import StudyFolder, open_features
from rlgen_stats.stores.trial_completions import ArmFiles
from rlgen_stats.toolkit.extraction import generate
from rlgen_stats.toolkit.intervention import Condition, FeatureEdit, LiveTrial, editing, plan_trial
from rlgen_stats.toolkit.study import read_spec
from rlgen_stats.toolkit.trial.arms import Arm

SIZE: Final = 17
"""Features of every arm."""


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("runs/demo"), help="a finished study; default runs/demo")
    parser.add_argument("--arms", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--quick", action="store_true", help="5 arms, once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.arms, options.repetitions = 5, 1
    ways = Ways(options.study, options.arms)
    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()
        cases = [
            Case("arms in common batches, graded and stored", ways.together, lambda: f"{scratch}/{next(numbers)}"),
            Case("one arm after the other", ways.apart, lambda: f"{scratch}/{next(numbers)}"),
            Case("generate under an edit, as often", lambda _: ways.bare()),
        ]
        seconds = {name: spread(s) for name, s in interleaved(cases, options.repetitions, time.process_time).items()}
        together, apart, _ = (seconds[case.name]["median"] for case in cases)
        completions = len(ways.prompts) * options.arms
        rows = [
            {
                "what": name,
                "s": times["median"],
                "low": times["low"],
                "high": times["high"],
                "completions/s": completions / times["median"],
            }
            for name, times in seconds.items()
        ]
        report(
            options,
            Path(scratch),
            "Arms of a trial",
            settings={"arms": options.arms, "prompts": len(ways.prompts)},
            rows=rows,
            goals=[Goal("arms in common batches, times as fast as one after the other", apart / together, 1.0)],
        )


class Ways:
    """The same arms run in three ways."""

    def __init__(self, study: Path, n_arms: int) -> None:
        folder = StudyFolder(study)
        fires = open_features(folder.features)["firing"].max(["model", "prompt"]).values > 0
        features = np.flatnonzero(fires)[:SIZE].tolist()
        self.plan = plan_trial(read_spec(study), folder, features, provenance=PROVENANCE)
        if not self.plan.directions:
            raise SystemExit(f"{study}: {self.plan.why_not}")
        draw = np.random.default_rng(0)
        self.arms = [
            Arm(Condition(f"random-{i:03d}", "random", 0.0), FeatureEdit(tuple(chosen), "disable", skip_first=1))
            for i, chosen in enumerate(draw.choice(fires.size, SIZE, replace=False).tolist() for _ in range(n_arms))
        ]
        self.live = LiveTrial(self.plan)
        self.model, self.site = self.live.model("rl"), self.live.edit_site("disable")
        self.reader = self.live.readers["rl"]
        self.prompts = self.reader.encode(list(self.plan.prompts.table["text"])) * self.plan.n_samples

    def together(self, folder: str) -> None:
        """As a trial runs them."""
        self.live.plan = replace(self.plan, files=ArmFiles(Path(folder)))
        self.live.run_arms("disable", self.arms)

    def apart(self, folder: str) -> None:
        """Each alone."""
        self.live.plan = replace(self.plan, files=ArmFiles(Path(folder)))
        for arm in self.arms:
            self.live.run_arm("disable", arm)

    def bare(self) -> None:
        """Generation alone."""
        sampling = self.plan.sampling
        for arm in self.arms:
            assert arm.edit is not None
            with editing(self.model, arm.edit, self.site):
                generate(
                    self.model,
                    self.reader.tokenizer,
                    self.prompts,
                    max_new_tokens=sampling.generation.max_new_tokens,
                    end_of_turn=self.reader.end_of_turn,
                    temperature=sampling.generation.temperature,
                    top_p=sampling.generation.top_p,
                    seeds=sampling.seeds(self.plan.prompts.ids, fresh=False),
                    batch_size=sampling.generation.batch_size,
                )


if __name__ == "__main__":
    main()

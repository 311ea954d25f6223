"""What many arms of one trial cost, against as many trials of one arm and bare generation; needs a finished study."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from benchmarks.common import REPETITIONS, Case, interleaved, spread
from benchmarks.reports import Goal, report
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, open_features
from rlgen_stats.toolkit.extraction import find_model, generate, load_model, load_tokenizer
from rlgen_stats.toolkit.intervention import Condition, FeatureEdit, editing
from rlgen_stats.toolkit.study import read_spec
from rlgen_stats.toolkit.trial.arms import Arm
from rlgen_stats.toolkit.trial.run_arm import Subject, run_arm
from rlgen_stats.toolkit.trial.verify_causally import edit_site, make_bench, prepare

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
        fresh = iter(range(10**6))
        cases = [
            Case("arms of one trial, graded and stored", ways.together, lambda: f"{scratch}/{next(fresh)}"),
            Case("as many trials of one arm", ways.apart, lambda: f"{scratch}/{next(fresh)}"),
            Case("generate under an edit, as often", lambda _: ways.bare()),
        ]
        found = {name: spread(s) for name, s in interleaved(cases, options.repetitions).items()}
        trial_seconds, plain, _ = (found[case.name]["median"] for case in cases)
        completions = len(ways.prompts) * options.arms
        rows = [
            {"what": name, "s": times["median"], "low": times["low"], "high": times["high"],
             "completions/s": completions / times["median"]}
            for name, times in found.items()
        ]  # fmt: skip
        report(
            options, Path(scratch), "Arms of a trial",
            settings={"arms": options.arms, "prompts": len(ways.prompts)}, rows=rows,
            goals=[Goal("arms, times as long as single ones", trial_seconds / plain, 1.1, at_least=False)],
        )  # fmt: skip


class Ways:
    """The same arms run in three ways."""

    def __init__(self, study: Path, n_arms: int) -> None:
        self.spec: StudySpec = read_spec(study)
        folder = StudyFolder(study)
        fires = open_features(folder.features)["firing"].max(["model", "prompt"]).values > 0
        trial = prepare(self.spec, folder, np.flatnonzero(fires)[:SIZE])
        if isinstance(trial, str):
            raise SystemExit(f"{study}: {trial}")
        reference = find_model(trial.rl_view, self.spec, folder)
        self.model, self.tokenizer = load_model(reference), load_tokenizer(reference)
        self.subject = Subject("disable", self.model, edit_site(trial, "disable"), None)
        draw = np.random.default_rng(0)
        self.arms = [
            Arm(Condition(f"random-{i:03d}", "random", 0.0), FeatureEdit(tuple(chosen), "disable", skip_first=1))
            for i, chosen in enumerate(draw.choice(fires.size, SIZE, replace=False).tolist() for _ in range(n_arms))
        ]
        self.bench = make_bench(trial, folder, Provenance("benchmark", "0" * 64), self.tokenizer, "")
        self.prompts = list(trial.prompts["text"]) * self.spec.intervention.n_samples

    @torch.no_grad()
    def together(self, where: str) -> None:
        """One trial of all arms."""
        for arm in self.arms:
            run_arm(replace(self.bench, folder=Path(where)), self.subject, arm, None)

    @torch.no_grad()
    def apart(self, where: str) -> None:
        """One trial an arm."""
        for number, arm in enumerate(self.arms):
            run_arm(replace(self.bench, folder=Path(where) / str(number)), self.subject, arm, None)

    def bare(self) -> None:
        """Generation alone."""
        how = self.spec.generation
        for arm in self.arms:
            assert arm.edit is not None
            with editing(self.model, arm.edit, self.subject.site):
                generate(
                    self.model, self.tokenizer, self.prompts, max_new_tokens=how.max_new_tokens,
                    temperature=how.temperature, top_p=how.top_p, seeds=self.bench.seeds(fresh=False),
                    batch_size=how.batch_size,
                )  # fmt: skip


if __name__ == "__main__":
    main()

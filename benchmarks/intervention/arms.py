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
from rlgen_stats.stores import Provenance, StudyFolder
from rlgen_stats.toolkit.extraction import find_model, generate, load_model, load_tokenizer
from rlgen_stats.toolkit.intervention import Condition, FeatureEdit, editing
from rlgen_stats.toolkit.intervention.arms import Arm
from rlgen_stats.toolkit.intervention.trial import Subject, run_arm
from rlgen_stats.toolkit.intervention.verify import edit_site, make_bench, prepare
from rlgen_stats.toolkit.study import read_spec

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
    spec: StudySpec = read_spec(options.study)
    folder = StudyFolder(options.study)
    trial = prepare(spec, folder, range(SIZE))
    if isinstance(trial, str):
        raise SystemExit(f"{options.study}: {trial}")
    reference = find_model(trial.rl_view, spec, folder)
    model, tokenizer = load_model(reference), load_tokenizer(reference)
    subject = Subject("disable", model, edit_site(trial, "disable"), None)
    draw = np.random.default_rng(0)
    sets = [draw.choice(trial.crosscoder.n_features, SIZE, replace=False).tolist() for _ in range(options.arms)]
    arms = [
        Arm(Condition(f"random-{i:03d}", "random", 0.0), FeatureEdit(tuple(chosen), "disable", skip_first=1))
        for i, chosen in enumerate(sets)
    ]
    bench = make_bench(trial, folder, Provenance("benchmark", "0" * 64), tokenizer, "")
    prompts = list(trial.prompts["text"]) * spec.intervention.n_samples

    def apart(where: str) -> None:
        for number, arm in enumerate(arms):
            own = make_bench(trial, folder, Provenance("benchmark", "0" * 64), tokenizer, "")
            with torch.no_grad():
                run_arm(replace(own, folder=Path(where) / str(number)), subject, arm, None)

    def together(where: str) -> None:
        with torch.no_grad():
            for arm in arms:
                run_arm(replace(bench, folder=Path(where)), subject, arm, None)

    def single() -> None:
        for arm in arms:
            assert arm.edit is not None
            with editing(model, arm.edit, subject.site):
                generate(
                    model, tokenizer, prompts, max_new_tokens=spec.generation.max_new_tokens,
                    temperature=spec.generation.temperature, top_p=spec.generation.top_p,
                    seeds=bench.seeds(fresh=False), batch_size=spec.generation.batch_size,
                )  # fmt: skip

    with tempfile.TemporaryDirectory() as scratch:
        fresh = iter(range(10**6))
        cases = [
            Case("arms of one trial, graded and stored", together, lambda: f"{scratch}/{next(fresh)}"),
            Case("as many trials of one arm", apart, lambda: f"{scratch}/{next(fresh)}"),
            Case("generate under an edit, as often", lambda _: single()),
        ]
        found = {name: spread(s) for name, s in interleaved(cases, options.repetitions).items()}
        trial_seconds, plain, _ = (found[case.name]["median"] for case in cases)
        completions = len(prompts) * options.arms
        rows = [
            {"what": name, "s": times["median"], "low": times["low"], "high": times["high"],
             "completions/s": completions / times["median"]}
            for name, times in found.items()
        ]  # fmt: skip
        report(
            options, Path(scratch), "Arms of a trial", settings={"arms": options.arms, "prompts": len(prompts)},
            rows=rows, goals=[Goal("arms, times as long as single ones", trial_seconds / plain, 1.1, at_least=False)],
        )  # fmt: skip


if __name__ == "__main__":
    main()

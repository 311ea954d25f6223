"""Objective, lambda and readout on a real language model: what of its post-training do the features of one model show?

A base (any Hugging Face causal language model, given as a folder) is post-trained twice on small sums, by imitation of
worked answers and by GRPO on right answers, all parameters, with the study's own stages. All models then read the same
texts, half sums and half prose. Dictionaries of base and the two final models are trained on three quarters of the
prompts; readouts are measured and judged on the rest.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
import yaml
from transformers import AutoConfig

from benchmarks.reports import Goal, report
from rlgen_stats.cli.console import progress_for
from rlgen_stats.schemas.dims import PROMPT, SPLIT
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import Readout, StudySpec
from rlgen_stats.stores import PairedReader, StudyFolder, open_tokens, read_json
from rlgen_stats.stores.crosscoder_weights import SPEC
from rlgen_stats.stores.study_models import final_model, list_models
from rlgen_stats.toolkit.crosscoder import (
    Crosscoder,
    ReadoutHealth,
    fit_readout,
    judge_readout,
    load_crosscoder,
    measure_health,
    measure_readout,
    train_crosscoder,
)
from rlgen_stats.toolkit.crosscoder.data.paired import views_of
from rlgen_stats.toolkit.crosscoder.training.train import training_key
from rlgen_stats.toolkit.crosscoder.uses.encode import view_of
from rlgen_stats.toolkit.crosscoder.uses.readout_health import DFVE_MIN, own_fve
from rlgen_stats.toolkit.extraction import site_name, usable_tokens
from rlgen_stats.toolkit.study import read_spec, run_study


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    prompts: int = 240
    train_prompts: int = 512
    new_tokens: int = 32
    sft_steps: int = 40
    grpo_steps: int = 24
    n_features: int = 1536
    k: int = 32
    steps: int = 1500
    batch_size: int = 512


QUICK: Final = Size(24, 32, 8, 2, 2, 64, 8, 20, 64)
DICTIONARIES: Final[tuple[tuple[str, float, int, tuple[Readout, ...]], ...]] = (
    ("both", 4.0, 0, ("swap",)),
    ("both", 0.0, 0, ("swap",)),
    ("both", 2.0, 0, ("swap",)),
    ("both", 8.0, 0, ("swap",)),
    ("joint", 0.0, 0, ("swap", "own", "fit")),
    ("paired", 4.0, 0, ("swap",)),
    ("both", 4.0, 1, ("swap",)),
)
"""Objective, difference_weight, seed, readouts."""
TRAINED_ON, HELD_OUT = "selection", "verification"
"""Splits of the prompts."""
RUNS: Final = ("sft", "rl")
NAMES: Final = ("Tom", "Anna", "Ben", "Mia", "Sam", "Eva", "Max", "Lea")
THINGS: Final = ("apples", "pens", "books", "coins", "cards", "stones", "cups", "shells")
PROSE_WORDS: Final = 18
"""Words of a paragraph that the models go on from."""


# -- texts -----------------------------------------------------------------------------------------------------------
def problem(draw: random.Random) -> dict[str, str]:
    """One small sum, as a question or a story, with a worked answer."""
    task = draw.choice(("add", "take", "buy", "give"))
    a, b = draw.randint(1, 6), draw.randint(1, 6)
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    adds = task in ("add", "buy")
    first, result = (a, a + b) if adds else (a + b, a)
    sign = "+" if adds else "-"
    question = {
        "add": f"What is {first} + {b}?",
        "take": f"What is {first} - {b}?",
        "buy": f"{name} has {first} {things} and buys {b} more. How many {things} does {name} have now?",
        "give": f"{name} has {first} {things} and gives {b} away. How many {things} are left?",
    }[task]
    return {
        "text": f"Question: {question}\nAnswer:",
        "answer": str(result),
        "completion": f" {first} {sign} {b} = {result}",
        "task": task,
        "domain": "in",
    }


def problems(n: int, seed: int, *, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """``n`` different problems, none of them in ``without``."""
    draw, found = random.Random(seed), {}
    while len(found) < n:
        one = problem(draw)
        if one["text"] not in without:
            found[one["text"]] = one
    return list(found.values())


def prose(n: int, seed: int) -> list[dict[str, str]]:
    """``n`` beginnings of paragraphs of the Python reference, which every Python brings along; graded by no one."""
    paragraphs = sorted({" ".join(part.split()) for text in topics.values() for part in re.split(r"\n\s*\n", text)})
    words = [part.split() for part in paragraphs if re.match(r"[A-Z][a-z]* [a-z]", part)]
    long = [some for some in words if len(some) > PROSE_WORDS]
    return [
        {"text": " ".join(some[:PROSE_WORDS]), "answer": some[PROSE_WORDS], "task": "prose", "domain": "out"}
        for some in random.Random(seed).sample(long, n)
    ]


def write_study(folder: Path, base: Path, size: Size) -> None:
    """The tables and study.yaml."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    asked = problems(size.prompts // 2, 1)
    rows = asked + prose(size.prompts - len(asked), 2)
    prompts = pd.DataFrame(rows).drop(columns="completion")
    prompts.insert(0, "prompt_id", [f"{row['task']}-{i:03d}" for i, row in enumerate(rows)])
    prompts["split"] = [HELD_OUT if i % 4 == 0 else TRAINED_ON for i in range(len(rows))]
    prompts.to_csv(folder / "data/prompts.csv", index=False)
    train = problems(size.train_prompts, 3, without=frozenset(row["text"] for row in asked))
    pd.DataFrame(train)[["text", "answer", "completion"]].to_csv(folder / "data/train.csv", index=False)
    always = {"gradient_checkpointing": False, "logging_steps": 2, "learning_rate": 1e-5}
    trainers = {
        "sft": {"max_steps": size.sft_steps, "per_device_train_batch_size": 8},
        "grpo": {"max_steps": size.grpo_steps, "per_device_train_batch_size": 16, "num_generations": 4, "beta": 0.0}
        | {"max_completion_length": size.new_tokens, "temperature": 0.7, "loss_type": "dr_grpo"}
        | {"scale_rewards": "none"},
    }
    views = ["base@0", *(f"{run}@final" for run in RUNS)]
    study = {
        "schema_version": 1,
        "name": "real-model",
        "device": "cpu",
        "base": {"path": str(base.resolve())},
        "runs": [
            {"name": run, "arm": run, "method": method, "n_checkpoints": 2, "trainer": trainers[method] | always}
            for run, method in zip(RUNS, trainers, strict=True)
        ],
        "contrast": list(RUNS),
        "data": {"prompts": "data/prompts.csv", "train": "data/train.csv"},
        "generation": {"max_new_tokens": size.new_tokens, "n_samples": 1, "batch_size": 64},
        "grader": {"name": "math"},
        "extraction": {"layer": AutoConfig.from_pretrained(base).num_hidden_layers // 2, "batch_size": 32},
        "crosscoders": [
            {"name": "main", "views": views, "n_features": size.n_features, "k": size.k, "steps": size.steps}
            | {"batch_size": size.batch_size, "learning_rate": 1e-3}
        ],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


# -- dictionaries ----------------------------------------------------------------------------------------------------
class Measured:
    """The study's models, and readers of what they make of the prompts trained on and of the others."""

    def __init__(self, folder: Path) -> None:
        self.spec: StudySpec = read_spec(folder)
        self.folder = StudyFolder(folder)
        self.models = tuple(ref.model for ref in list_models(self.spec, self.folder))
        self.final = tuple(final_model(self.spec, self.folder, run).model for run in RUNS)
        self.views = (self.models[0], *self.final)
        self.mask = usable_tokens(self.spec, self.folder)
        self.site = site_name(self.spec.extraction.layer)
        labels = open_tokens(self.folder.activations).attrs
        self.data_hash = content_hash([labels.get("spec_hash"), labels.get("labels_hash"), self.site, TRAINED_ON])

    def reader(self, models: tuple[str, ...], split: str) -> PairedReader:
        """Activations of these models on the prompts of one split."""
        size = self.spec.primary_crosscoder.batch_size
        place = self.folder.activations
        return PairedReader(place, models, self.site, batch_size=size, seed=0, mask=self.mask, where={"split": split})

    def sizes(self) -> dict[str, Any]:
        """For the report's head line."""
        trained, held_out = (self.reader(self.views, split) for split in (TRAINED_ON, HELD_OUT))
        spec = self.spec.primary_crosscoder
        return {
            "site": self.site, "width": trained.width, "features": spec.n_features, "k": spec.k, "steps": spec.steps,
            "tokens trained on": trained.n_tokens, "measured on": held_out.n_tokens,
            "left out as sinks or first": int((~self.mask).sum()),
        }  # fmt: skip

    def dictionary(self, objective: str, weight: float, seed: int) -> Crosscoder:
        """Trained on the selection prompts, or read if it has been."""
        changed = {"objective": objective, "difference_weight": weight, "seed": seed}
        spec = self.spec.primary_crosscoder.model_copy(update=changed)
        folder = self.folder.root / "dictionaries" / f"{objective}-{weight:g}-{seed}"
        key = training_key(spec, self.views, seed=seed, data_hash=self.data_hash)
        if (folder / SPEC).exists() and read_json(folder / SPEC)["facts"]["key"] == key:
            return load_crosscoder(folder)
        reader = self.reader(self.views, TRAINED_ON)
        return train_crosscoder(reader, spec, views=self.views, seed=seed, folder=folder, data_hash=self.data_hash)

    def rows(self, objective: str, weight: float, seed: int, readouts: tuple[Readout, ...]) -> Iterator[dict[str, Any]]:
        """One row a readout."""
        crosscoder = self.dictionary(objective, weight, seed)
        if "fit" in readouts:
            crosscoder = fit_readout(crosscoder, self.reader(self.views, TRAINED_ON))
        for readout in readouts:
            found = {split: self.judged(crosscoder, readout, split) for split in (HELD_OUT, TRAINED_ON)}
            (own, health), (_, trained_on) = found[HELD_OUT], found[TRAINED_ON]
            of = {one.model: one for one in health.models}
            on_trained = {one.model: one for one in trained_on.models}
            sft, rl = ([model for model in self.models if model.startswith(f"{run}@")] for run in RUNS)
            yield {
                "objective": objective,
                "lambda": weight if objective != "joint" else None,
                "seed": seed,
                "readout": readout,
                "FVE joint": own,
                "FVE of models": _span([one.fve for one in health.models]),
                "L0": _span([one.l0 for one in health.models]),
                "dFVE SFT": of[sft[-1]].dfve,
                "dFVE SFT half way": of[sft[0]].dfve,
                "dFVE RL": of[rl[-1]].dfve,
                "dFVE RL half way": of[rl[0]].dfve,
                "dFVE SFT, prompts trained on": on_trained[sft[-1]].dfve,
                "dFVE RL, prompts trained on": on_trained[rl[-1]].dfve,
                "dFVE SFT, prompt means": self.dfve_of_means(crosscoder, readout, sft[-1]),
                "dFVE RL, prompt means": self.dfve_of_means(crosscoder, readout, rl[-1]),
                "code R2 SFT": of[sft[-1]].code_r2,
                "code R2 RL": of[rl[-1]].code_r2,
                "artefact RL": of[rl[-1]].artefact,
                "change SFT": of[sft[-1]].change,
                "change RL": of[rl[-1]].change,
                "fails": _failed(health),
                "fails on prompts trained on": _failed(trained_on),
            }

    def judged(self, crosscoder: Crosscoder, readout: Readout, split: str) -> tuple[float, ReadoutHealth]:
        """The dictionary's own FVE, and its readout on all models, held against the limits."""
        own = own_fve(crosscoder, measure_health(crosscoder, self.reader(self.views, split), readout=readout))
        models = measure_readout(crosscoder, self.reader(self.models, split), self.models, readout=readout)
        return own, judge_readout(crosscoder, models, own_fve=own, contrasted=self.final, readout=readout)

    def dfve_of_means(self, crosscoder: Crosscoder, readout: Readout, model: str) -> float:
        """Share of the variance over held-out prompts of a model's mean change that decoded features explain."""
        tokens = open_tokens(self.folder.activations)
        prompt = tokens[PROMPT].values[self.mask & (tokens[SPLIT].values == HELD_OUT)]
        true, found = [], []
        for base, changed in map(views_of, self.reader((self.models[0], model), HELD_OUT).sequential(1 << 12)):
            pair = ((self.models[0], base), (view_of(model, crosscoder.views), changed))
            back = [
                crosscoder.reconstruct(crosscoder.readout(torch.from_numpy(raw.copy()), view=view, kind=readout), view)
                for view, raw in pair
            ]
            true.append(changed - base)
            found.append((back[1] - back[0]).numpy())
        means = [pd.DataFrame(np.concatenate(part)).groupby(prompt).mean().to_numpy() for part in (true, found)]
        residual, about_mean = means[0] - means[1], means[0] - means[0].mean(axis=0)
        return float(1 - np.square(residual).sum() / np.square(about_mean).sum())


def _failed(health: ReadoutHealth) -> str:
    return ", ".join(dict.fromkeys(check.name.removeprefix("readout_") for check in health.checks if not check.ok))


def _span(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def main() -> None:
    """Post-train, read, train the dictionaries, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a Hugging Face causal language model")
    parser.add_argument("--folder", type=Path, required=True, help="where the study goes; what is finished is kept")
    parser.add_argument("--quick", action="store_true", help="tiny: checks the script, measures nothing")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    write_study(options.folder, options.base, size)
    with progress_for() as progress:
        run_study(options.folder, stages=["extract"], progress=progress)
    measured, rows = Measured(options.folder), []
    for objective, weight, seed, readouts in DICTIONARIES:
        start = time.monotonic()
        rows += measured.rows(objective, weight, seed, readouts)
        sys.stderr.write(f"{objective}, lambda {weight:g}, seed {seed}: {time.monotonic() - start:.0f} s\n")
    default = rows[0]
    settings = measured.sizes() | {name: f"{default[name]:.3g}" for name in ("change SFT", "change RL")}
    for row in rows:
        del row["change SFT"], row["change RL"]
    options.repetitions = 1
    report(
        options,
        options.folder,
        "A real model",
        settings=settings,
        rows=rows,
        goals=[Goal(f"{name} with the default", default[name], DFVE_MIN) for name in ("dFVE SFT", "dFVE RL")],
    )


if __name__ == "__main__":
    main()

"""Objective, weight and readout on a real language model: what of its post-training do the features of one model show?

A base (any Hugging Face causal language model, given as a folder) is post-trained twice on small sums, by imitation of
worked answers and by GRPO on right answers, all parameters, by the study's own stage. All models then read the same
texts, sums with their answers and prose. Two dictionaries of base and both final models are trained for each row, on
three quarters of the texts; readouts are measured on these and on the rest. What is finished is kept and not run again.
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
import yaml
from numpy.typing import NDArray

from benchmarks.reports import Goal, report
from rlgen_stats.cli.console import progress_for
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import CrosscoderSpec, Readout
from rlgen_stats.stores import read_json
from rlgen_stats.stores.atomic import replacing
from rlgen_stats.stores.crosscoder_weights import SPEC
from rlgen_stats.stores.study_models import final_model, list_models
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    agreement_sums,
    fit_readout,
    judge_readout,
    load_crosscoder,
    measure_health,
    measure_readout,
    train_replicates,
)
from rlgen_stats.toolkit.crosscoder.data.live_activations import live_corpus
from rlgen_stats.toolkit.crosscoder.training.train import training_key
from rlgen_stats.toolkit.crosscoder.uses.readout_health import CODE_R2_MIN, DFVE_MIN, own_fve
from rlgen_stats.toolkit.statistics.replicability import decoded_agreement
from rlgen_stats.toolkit.study import Study, run_study


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    sums: int = 120
    prose: int = 360
    train_prompts: int = 512
    new_tokens: int = 32
    sft_steps: int = 40
    grpo_steps: int = 24
    n_features: int = 1024
    k: int = 32
    steps: int = 1000
    batch_size: int = 256


QUICK: Final = Size(12, 12, 32, 8, 2, 2, 64, 8, 20, 64)
DICTIONARIES: Final[tuple[tuple[str, float, tuple[Readout, ...]], ...]] = (
    ("joint", 0.0, ("swap", "own", "fit")),
    *(("both", weight, ("swap",)) for weight in (0.0, 0.1, 0.3, 0.5, 1.0, 3.0)),
    *(("paired", weight, ("swap",)) for weight in (0.0, 0.5)),
)
"""Objective, difference_weight, readouts."""
DEFAULT: Final = {"objective": "both", "weight": CrosscoderSpec.model_fields["difference_weight"].default}
SEEDS: Final = (0, 1)
"""Of the initial weights; both see the same batches."""
TRAINED_ON, HELD_OUT = "selection", "verification"
"""Splits of the texts."""
RUNS: Final = ("sft", "rl")
NAMES: Final = ("Tom", "Anna", "Ben", "Mia", "Sam", "Eva", "Max", "Lea")
THINGS: Final = ("apples", "pens", "books", "coins", "cards", "stones", "cups", "shells")
PROSE_WORDS: Final = 18
"""Words of a paragraph that are its prompt."""
TEXT_WORDS: Final = 80
"""Words of a paragraph that are read."""


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
    """``n`` paragraphs of the Python reference, which every Python brings along; graded by no one."""
    paragraphs = sorted({" ".join(part.split()) for text in topics.values() for part in re.split(r"\n\s*\n", text)})
    words = [part.split() for part in paragraphs if re.match(r"[A-Z][a-z]* [a-z]", part)]
    long = [some for some in words if len(some) > PROSE_WORDS]
    return [
        {
            "text": " ".join(some[:PROSE_WORDS]),
            "answer": some[PROSE_WORDS],
            "completion": " " + " ".join(some[PROSE_WORDS:TEXT_WORDS]),
            "task": "prose",
            "domain": "out",
        }
        for some in random.Random(seed).sample(long, n)
    ]


def write_study(folder: Path, base: Path, size: Size) -> None:
    """The tables and study.yaml."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    asked = problems(size.sums, 1)
    prompts = pd.DataFrame(asked + prose(size.prose, 2))
    completion = prompts.pop("completion")
    prompts.insert(0, "prompt_id", [f"{task}-{i:03d}" for i, task in enumerate(prompts["task"])])
    prompts["split"] = [HELD_OUT if i % 4 == 0 else TRAINED_ON for i in range(len(prompts))]
    prompts.to_csv(folder / "data/prompts.csv", index=False)
    sums = prompts[prompts["domain"] == "in"]
    in_words = sums.assign(text=sums["text"] + " The answer is " + sums["answer"] + ".")
    texts = pd.concat([prompts.assign(text=prompts["text"] + completion), in_words])
    for split, part in texts.groupby("split"):
        part[["text"]].to_csv(folder / f"data/{split}.csv", index=False)
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
        "grader": {"name": "math"},
        "extraction": {"layer": "middle", "batch_size": 32},
        "crosscoders": [
            {"name": "main", "views": views, "n_features": size.n_features, "k": size.k, "steps": size.steps}
            | {"batch_size": size.batch_size, "learning_rate": 1e-3}
        ],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


# -- activations and dictionaries --------------------------------------------------------------------------------------
class RealModel:
    """The post-trained study: activations of all models on both splits, and what dictionaries make of them."""

    def __init__(self, study: Study) -> None:
        self.study, self.spec = study, study.spec.primary_crosscoder
        self.folder = study.folder.root
        self.models = tuple(ref.model for ref in list_models(study.spec, study.folder))
        self.final = tuple(final_model(study.spec, study.folder, run).model for run in RUNS)
        self.views = (self.models[0], *self.final)
        self.data_hash = content_hash(
            [study.key("posttrain"), study.spec.extraction.layer, (self.folder / f"data/{TRAINED_ON}.csv").read_text()]
        )
        self.models_of = {TRAINED_ON: self.views, HELD_OUT: self.models}
        self.read = {split: self.activations(split) for split in self.models_of}

    def activations(self, split: str) -> NDArray[np.float32]:
        """[token, model, channel] without first tokens and attention sinks; computed once.

        Of the texts trained on those of the views, of the others those of all models.
        """
        file = self.folder / f"activations/{split}-{self.data_hash[:12]}.npy"
        if not file.exists():
            corpus = self.folder / f"data/{split}.csv"
            live = live_corpus(self.study.spec, self.study.folder, self.models_of[split], corpus, batch_size=1, seed=0)
            tokens = np.concatenate(list(live.sequential(1 << 16)))
            norms = np.linalg.norm(tokens[:, 0], axis=1)
            with replacing(file) as partial, partial.open("wb") as out:
                np.save(out, tokens[norms <= self.study.spec.extraction.max_norm_ratio * np.median(norms)])
        return np.asarray(np.load(file), dtype=np.float32)

    def reader(self, models: tuple[str, ...], split: str) -> ArrayReader:
        """Activations of these models, in batches."""
        slots = [self.models_of[split].index(model) for model in models]
        return ArrayReader(self.read[split][:, slots], batch_size=self.spec.batch_size, seed=0)

    def dictionaries(self, objective: str, weight: float) -> list[Crosscoder]:
        """One a seed; those that are not on disk are trained, in one pass over the data."""
        spec = self.spec.model_copy(update={"objective": objective, "difference_weight": weight})
        folders = [self.folder / f"dictionaries/{objective}-{weight:g}-{seed}" for seed in SEEDS]
        keys = [training_key(spec, self.views, seed=seed, data_hash=self.data_hash) for seed in SEEDS]
        if all(
            (folder / SPEC).exists() and read_json(folder / SPEC)["facts"]["key"] == key
            for folder, key in zip(folders, keys, strict=True)
        ):
            return [load_crosscoder(folder) for folder in folders]
        reader = self.reader(self.views, TRAINED_ON)
        return train_replicates(reader, spec, views=self.views, seeds=SEEDS, folders=folders, data_hash=self.data_hash)

    def rows(self, objective: str, weight: float, readouts: tuple[Readout, ...]) -> Iterator[dict[str, Any]]:
        """One row a readout: means of both dictionaries, and how far they agree."""
        pair = self.dictionaries(objective, weight)
        for readout in readouts:
            if readout == "fit":
                pair = [fit_readout(one, self.reader(self.views, TRAINED_ON)) for one in pair]
            measured = pd.DataFrame([self.measured(one, readout) for one in pair])
            means = {str(name): value for name, value in measured.drop(columns="fails").mean().items()}
            sums = agreement_sums(pair, self.reader(self.models, HELD_OUT), self.models, readout=readout)
            of_rl = decoded_agreement(sums).sel(model=self.final[-1])
            yield {
                "objective": objective,
                "weight": None if objective == "joint" else weight,
                "readout": readout,
                **means,
                "rl: true and decoded": float(of_rl.true_correlation.mean()),
                "of two seeds": float(of_rl.decoded_correlation[0, 1]),
                "their errors": float(of_rl.error_correlation[0, 1]),
                "fails": ", ".join(dict.fromkeys(name for names in measured["fails"] for name in names)),
            }

    def measured(self, crosscoder: Crosscoder, readout: Readout) -> dict[str, Any]:
        """One dictionary under one readout, on held-out texts and on as many tokens of those trained on."""
        fve = own_fve(crosscoder, measure_health(crosscoder, self.reader(self.views, HELD_OUT), readout=readout))
        n_tokens = len(self.read[HELD_OUT])
        held_out, trained_on = (
            measure_readout(crosscoder, self.reader(models, split), models, readout=readout, max_tokens=n_tokens)
            for models, split in ((self.models, HELD_OUT), (self.views, TRAINED_ON))
        )
        health = judge_readout(crosscoder, held_out, own_fve=fve, contrasted=self.final, readout=readout)
        of, of_trained_on = ({one.model: one for one in models} for models in (held_out, trained_on))
        sft, rl = self.final
        first_rl = next(model for model in self.models if model.startswith("rl@"))
        return {
            "FVE": fve,
            "FVE of models": min(one.fve for one in held_out),
            "trained on": min(one.fve for one in trained_on),
            "L0": max(one.l0 for one in held_out),
            "dFVE sft": of[sft].dfve,
            "sft, trained on": of_trained_on[sft].dfve,
            "dFVE rl": of[rl].dfve,
            "rl, trained on": of_trained_on[rl].dfve,
            "rl, half way": of[first_rl].dfve,
            "code R2 sft": of[sft].code_r2,
            "code R2 rl": of[rl].code_r2,
            "artefact": of[rl].artefact,
            "fails": [check.name.removeprefix("readout_") for check in health.checks if not check.ok],
        }

    def settings(self) -> dict[str, Any]:
        """What the table's head says."""
        held_out, spec = self.read[HELD_OUT].astype(np.float64), self.spec
        base = held_out[:, 0]
        changes = [np.square(held_out[:, self.models.index(final)] - base).sum() for final in self.final]
        sizes = {"width": base.shape[1], "features": spec.n_features, "k": spec.k, "steps": spec.steps}
        sizes |= {"batch": spec.batch_size, "tokens trained on": len(self.read[TRAINED_ON]), "held out": len(base)}
        spread = np.square(base - base.mean(axis=0)).sum()
        return sizes | {f"change of {run}": f"{c / spread:.2g}" for run, c in zip(RUNS, changes, strict=True)}


def main() -> None:
    """Post-train, read, train the dictionaries, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a Hugging Face causal language model")
    parser.add_argument("--folder", type=Path, required=True, help="where the study goes; what is finished is kept")
    parser.add_argument("--quick", action="store_true", help="tiny: checks the script, measures nothing")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    write_study(options.folder, options.base, QUICK if options.quick else Size())
    with progress_for() as progress:
        real = RealModel(run_study(options.folder, stages=["posttrain"], progress=progress))
    rows: list[dict[str, Any]] = []
    for objective, weight, readouts in DICTIONARIES:
        start = time.monotonic()
        rows += real.rows(objective, weight, readouts)
        sys.stderr.write(f"{objective}, weight {weight:g}: {time.monotonic() - start:.0f} s\n")
    options.repetitions = 1
    default = next(row for row in rows if row | DEFAULT == row)
    limits = {"dFVE": DFVE_MIN, "code R2": CODE_R2_MIN}
    goals = [
        Goal(f"{name} of {run} with the default", default[f"{name} {run}"], limit)
        for run in RUNS
        for name, limit in limits.items()
    ]
    report(options, options.folder, "A real model", settings=real.settings(), rows=rows, goals=goals)


if __name__ == "__main__":
    main()

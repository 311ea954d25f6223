"""Faults of stores, counted: killed writers, flipped bits, and sound pieces in the wrong place."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.errors import RlgenStatsError
from rlgen_stats.stores import (
    ActivationWriter,
    Provenance,
    append_model,
    committed_models,
    complete_models,
    create_activations,
    open_activations,
    open_features,
    open_outcomes,
    open_results,
    open_tokens,
    result_groups,
    seals,
    verify,
    write_results,
)
from rlgen_stats.stores.atomic import ZARR_JSON
from rlgen_stats.stores.shards import PARTIAL
from tests.faults.kills import drawn, elsewhere, run
from tests.stores.conftest import feature_table, hashes, token_table
from tests.stores.test_seals import notes, outcome_table

N, WIDTH, SHARD = 1500, 4, 100
MODELS: Final = ("base@0", "rl@40", "rl@80")
GROUPS: Final = ("notes", "others")
PROVENANCE: Final = Provenance("study-one", "key-one")
Log = Callable[[Any], object]


def write_stores(folder: Path, seed: int = 0) -> None:
    """What a study's stages write, going on with whatever is there; two seeds give equal shapes and other values."""
    tokens, prompts = token_table(N)
    tokens["token_id"] += seed
    activations = folder / "activations.zarr"
    create_activations(activations, tokens, prompts, provenance=PROVENANCE, shard_tokens=SHARD)
    for number, model in enumerate(MODELS):
        values = np.random.default_rng([seed, number]).normal(size=(N, WIDTH)).astype("f4")
        with ActivationWriter(activations, model=model, site="block2", width=WIDTH) as writer:
            writer.append(values[writer.n_committed :])
        value = 10 * seed + number
        tables = {"features": feature_table(model, float(value)), "outcomes": outcome_table(model, value)}
        for layout, table in tables.items():
            if model not in committed_models(folder / f"{layout}.zarr"):
                append_model(folder / f"{layout}.zarr", layout, table, provenance=PROVENANCE)
        for place, group in enumerate(GROUPS):  # written anew with every model
            write_results(folder / "results.zarr", group, notes(float(value + place)), provenance=PROVENANCE)


def read_store(store: Path) -> dict[str, xr.Dataset]:
    """Everything that this package's readers read of a store."""
    readers: dict[str, Callable[[Path], xr.Dataset]] = {
        "activations": open_activations,
        "tokens": open_tokens,
        "features": open_features,
        "outcomes": open_outcomes,
    }
    names = {"activations": ("activations", "tokens"), "results": ()}.get(store.stem, (store.stem,))
    found = {name: readers[name](store) for name in names}
    if store.stem == "results":
        found = {group: open_results(store, group) for group in result_groups(store)}
    return {name: dataset.load() for name, dataset in found.items()}


# -- kills


def done(folder: Path) -> set[str]:
    """What was announced as written."""
    activations, results = folder / "activations.zarr", folder / "results.zarr"
    found = {f"activations {model}" for model in (complete_models(activations) if activations.exists() else ())}
    for layout in ("features", "outcomes"):
        found |= {f"{layout} {model}" for model in committed_models(folder / f"{layout}.zarr")}
    return found | {f"results {group}" for group in result_groups(results)}


def state(folder: Path) -> tuple[set[str], list[str]]:
    """What is announced, and what verify finds of it."""
    stores = sorted(store for store in folder.glob("*.zarr") if (store / "zarr.json").exists())
    return done(folder), [problem for store in stores for problem in verify(store).problems]


def count_kills(root: Path, *, n: int, seed: int, log: Log) -> Counter[str]:
    """Kill a process that writes all stores, over and over, until it ends; then begin again."""
    tally, draw = Counter[str](), random.Random(seed)
    whole, killed = root / "whole", root / "killed"
    changes = run(lambda: write_stores(whole), whole).changes
    while tally.total() < n:
        shutil.rmtree(killed, ignore_errors=True)
        announced: set[str] = set()
        while True:
            ended = run(lambda: write_stores(killed), killed, drawn(draw, changes, "", 0.05))
            if ended.moment is None:
                break
            now, problems = elsewhere(state, killed)
            verdict = "lost" if announced - now else "named" if problems else "harmless"
            if verdict != "harmless":
                log(f"{verdict}: killed at {ended.moment}: {announced - now or problems}")
            tally[verdict] += 1
            announced = now
        if ended.code != 0:
            log(f"lost: {ended.said}")
            tally["lost"] += 1
        elif other := dict(kept(killed).items() ^ kept(whole).items()):
            log(f"silently wrong: {sorted(other)}")
            tally["silently wrong"] += 1
    return tally


def kept(folder: Path) -> dict[str, str]:
    """Hashes of all files but locks, begun shards (a writer overwrites them) and what groups say of their origin."""
    names = (name for name in hashes(folder).items() if not name[0].endswith((PARTIAL, ".lock")))
    return {name: one for name, one in names if not _is_group(folder / name)}


def _is_group(file: Path) -> bool:
    return file.name == ZARR_JSON and json.loads(file.read_text())["node_type"] == "group"


# -- bits and places


def store_of(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.suffix == ".zarr")


def judged(store: Path, sound: dict[str, xr.Dataset]) -> tuple[str, str]:
    """``named`` if verify or a reader says that something is wrong, ``harmless`` if all that is read is what it was."""
    seals.checksums.cache_clear()
    try:
        problems = list(verify(store).problems)
    except RlgenStatsError as error:
        problems = [str(error)]
    try:
        read = read_store(store)
    except RlgenStatsError as error:
        return ("named", str(error)) if problems else ("named by readers alone", str(error))
    except Exception as error:  # named by nobody: a traceback
        return "lost", repr(error)
    same = read.keys() == sound.keys() and all(read[name].equals(sound[name]) for name in sound)
    if problems:
        return ("named" if same else "named by verify alone"), problems[0]
    return ("harmless" if same else "silently wrong"), ""


@contextmanager
def restored(*paths: Path) -> Iterator[None]:
    """Afterwards files and folders are what they were."""
    aside = Path(tempfile.mkdtemp(prefix="aside-"))
    for number, path in enumerate(paths):
        shutil.copytree(path, aside / str(number)) if path.is_dir() else shutil.copy(path, aside / str(number))
    try:
        yield
    finally:
        for number, path in enumerate(paths):
            if path.is_dir():
                shutil.rmtree(path)
                shutil.copytree(aside / str(number), path)
            else:
                shutil.copy(aside / str(number), path)
        shutil.rmtree(aside)


def count_flips(root: Path, *, n: int, seed: int, log: Log) -> Counter[str]:
    """One bit of one file, small files nearly as often as large ones."""
    study, draw, tally = root / "study", random.Random(seed), Counter[str]()
    sound = {store: read_store(store) for store in study.glob("*.zarr")}
    files = sorted(file for file in study.rglob("*") if file.is_file() and not file.name.endswith(".lock"))
    weights = [file.stat().st_size ** 0.25 for file in files]
    for file in draw.choices(files, weights, k=n):
        content = bytearray(file.read_bytes())
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        with restored(file):
            file.write_bytes(bytes(content))
            verdict, said = judged(store_of(file), sound[store_of(file)])
        if verdict not in ("named", "harmless"):
            log(f"{verdict}: bit {bit} of byte {place} of {file.relative_to(study)}: {said}")
        tally[verdict] += 1
    return tally


def count_misplaced(root: Path, *, n: int, seed: int, log: Log) -> Counter[str]:
    """Sound chunks swapped, put in another's place or put back, and metadata and whole groups put back."""
    study, older, draw, tally = root / "study", root / "older", random.Random(seed), Counter[str]()
    sound = {store: read_store(store) for store in study.glob("*.zarr")}
    chunks = sorted({*study.rglob("c/**/*"), *study.rglob("c/*"), *study.rglob("c.*")})
    by_array: dict[str, list[Path]] = {}
    for chunk in filter(Path.is_file, chunks):
        by_array.setdefault(chunk.as_posix().rpartition("/c")[0].rpartition("/")[2], []).append(chunk)
    back = {
        "chunk back": [chunk for of_array in by_array.values() for chunk in of_array],
        "metadata back": sorted(study.rglob("*.json")),
        "group back": sorted(file.parent for file in study.rglob("zarr.json") if file.parent.parent != study),
    }
    alike = [of_array for of_array in by_array.values() if len(of_array) > 1]
    while tally.total() < n:
        kind = draw.choice(("swap", "duplicate", *back))
        one = draw.choice(back[kind] if kind in back else draw.choice(alike))
        two = older / one.relative_to(study) if kind in back else draw.choice(next(a for a in alike if one in a))
        if one.read_bytes() == two.read_bytes() if one.is_file() else hashes(one) == hashes(two):
            continue
        with restored(*((one, two) if kind == "swap" else (one,))):
            _put(two, one, swap=kind == "swap")
            verdict, said = judged(store_of(one), sound[store_of(one)])
        if verdict not in ("named", "harmless"):
            log(f"{verdict}: {kind} of {one.relative_to(study)} and {two}: {said}")
        tally[verdict] += 1
    return tally


def _put(what: Path, where: Path, *, swap: bool) -> None:
    if what.is_dir():
        shutil.rmtree(where)
        shutil.copytree(what, where)
        return
    before = where.read_bytes()
    shutil.copy(what, where)
    if swap:
        what.write_bytes(before)


def prepare(root: Path) -> Path:
    """A study and an older one of the same shapes."""
    for seed, name in enumerate(("study", "older")):
        write_stores(root / name, seed)
    return root

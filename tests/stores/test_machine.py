"""State machines: any sequence of appends, crashes, other writers and readers against a model in memory."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlgen_stats.schemas.errors import StoreError, StoreLockedError
from rlgen_stats.stores import (
    ActivationWriter,
    PairedReader,
    Provenance,
    append_model,
    committed_models,
    complete_models,
    create_activations,
    open_activations,
    open_features,
    open_tokens,
    select_tokens,
    verify,
)
from rlgen_stats.stores import tables as tables_module
from rlgen_stats.stores import writer as writer_module
from rlgen_stats.stores.activation_store import stored_models
from rlgen_stats.stores.labels import positions_in
from tests.stores.conftest import feature_table, token_table

N, SHARD, WIDTH = 90, 20, 3
PROVENANCE = Provenance("study-one", "key-one")
MODELS = ("base@0", "rl@10", "rl@20")
SITES = ("block1", "block2")
EXAMPLES = int(os.environ.get("RLGEN_STATS_EXAMPLES", "2"))
"""Histories tried by one test; ``make faults`` asks for more."""
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate] if EXAMPLES < 10 else list(Phase),
)


class Crash(Exception):
    """The process ends here."""


class ActivationMachine(RuleBasedStateMachine):
    """An activation store and what it must hold: (model, site) -> shards that are committed."""

    @initialize()
    def create(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.zarr"
        create_activations(self.path, *token_table(N), provenance=PROVENANCE, shard_tokens=SHARD)
        self.shards: dict[tuple[str, str], set[int]] = {}
        self.values = {
            (m, s): np.random.default_rng([i, j]).normal(size=(N, WIDTH)).astype("f4")
            for i, m in enumerate(MODELS)
            for j, s in enumerate(SITES)
        }

    def key_of(self, model: str, site: str) -> set[int]:
        return self.shards.setdefault((model, site), set())

    @rule(model=st.sampled_from(MODELS), site=st.sampled_from(SITES), upto=st.integers(0, N), batch=st.integers(1, 40))
    def write_and_stop(self, model: str, site: str, upto: int, batch: int) -> None:
        """Feed tokens up to a point and leave, as after an error of the caller: whole shards stay."""
        committed = self.key_of(model, site)
        first = next((i for i in range(5) if i not in committed), 5)
        with suppress(Crash), ActivationWriter(self.path, model=model, site=site, width=WIDTH) as writer:
            assert writer.n_committed == min(first * SHARD, N)
            for start in range(writer.n_committed, upto, batch):
                writer.append(self.values[model, site][start : min(start + batch, upto)])
            raise Crash
        if upto > min(first * SHARD, N):
            committed |= set(range(first, 5 if upto == N else upto // SHARD))

    @rule(model=st.sampled_from(MODELS), site=st.sampled_from(SITES), first=st.integers(0, 4), n=st.integers(1, 5))
    def write_a_range(self, model: str, site: str, first: int, n: int) -> None:
        """Another rank writes its shards."""
        stop = min(first + n, 5)
        with ActivationWriter(self.path, model=model, site=site, width=WIDTH, shards=range(first, stop)) as writer:
            rows = self.values[model, site][first * SHARD : stop * SHARD]
            writer.append(rows[writer.n_committed :])
        self.key_of(model, site).update(range(first, stop))

    @rule(model=st.sampled_from(MODELS), site=st.sampled_from(SITES), calls=st.integers(1, 6), torn=st.booleans())
    def die(self, model: str, site: str, calls: int, torn: bool) -> None:
        """The process dies before its n-th file, which is left torn or not begun."""
        committed, real, made = self.key_of(model, site), writer_module.write_chunk, 0

        def dying(folder: Path, index: int, values: np.ndarray, *, ndim: int) -> int:
            nonlocal made
            made += 1
            if made >= calls:
                if torn:
                    (folder / f"c.{index}.0.partial").write_bytes(b"half")
                raise Crash
            checksum = real(folder, index, values, ndim=ndim)
            if folder.name == "committed":
                committed.add(index)
            return checksum

        writer_module.write_chunk = dying
        try:
            with ActivationWriter(self.path, model=model, site=site, width=WIDTH) as writer:
                writer.append(self.values[model, site][writer.n_committed :])
        except Crash:
            pass
        finally:
            writer_module.write_chunk = real

    @rule(model=st.sampled_from(MODELS), site=st.sampled_from(SITES))
    def second_writer(self, model: str, site: str) -> None:
        """Two at once: the second is refused and changes nothing."""
        with (
            ActivationWriter(self.path, model=model, site=site, width=WIDTH),
            pytest.raises(StoreLockedError),
        ):
            ActivationWriter(self.path, model=model, site=site, width=WIDTH, shards=range(2, 3)).__enter__()
        self.key_of(model, site)

    @rule()
    def create_again(self) -> None:
        """The same labels change nothing; others are refused."""
        create_activations(self.path, *token_table(N), provenance=PROVENANCE, shard_tokens=SHARD)
        tokens, prompts = token_table(N)
        with pytest.raises(StoreError):
            create_activations(self.path, tokens.iloc[:-1], prompts, provenance=PROVENANCE)

    @rule(task=st.sampled_from(["math", "sciq"]), segment=st.sampled_from(["prompt", "completion"]))
    def select(self, task: str, segment: str) -> None:
        tokens = open_tokens(self.path)
        expected = np.flatnonzero((tokens.task.values == task) & (tokens.segment.values == segment))
        assert positions_in(select_tokens(self.path, task=task, segment=segment)).tolist() == expected.tolist()

    @rule(site=st.sampled_from(SITES), seed=st.integers(0, 5), batch=st.integers(1, 30), start=st.integers(0, 3))
    def read(self, site: str, seed: int, batch: int, start: int) -> None:
        """Every token once, the same tokens in every view, and from the middle what comes from the start."""
        models = complete_models(self.path, site)
        if not models:
            with pytest.raises(StoreError):
                PairedReader(self.path, list(MODELS), site, batch_size=batch, seed=seed)
            return
        reader = PairedReader(self.path, models, site, batch_size=batch, seed=seed, buffer_bytes=2 * SHARD * 4 * WIDTH)
        batches = list(reader.epoch(1))
        rows = np.concatenate(batches)
        expected = np.stack([self.values[model, site] for model in models], axis=1)
        assert {row.tobytes() for row in rows} <= {row.tobytes() for row in expected}
        assert len({row.tobytes() for row in rows}) == len(rows) == N - N % batch
        later = list(reader.epoch(1, start_batch=start))
        assert len(later) == max(0, len(batches) - start)
        for one, two in zip(later, batches[start:], strict=True):
            np.testing.assert_array_equal(one, two)

    @invariant()
    def holds_what_was_committed(self) -> None:
        if not hasattr(self, "path"):
            return
        told = stored_models(self.path)
        for key, shards in self.shards.items():
            first = next((i for i in range(5) if i not in shards), 5)
            assert told.get(key, 0) == min(first * SHARD, N)
        for site in SITES:
            complete = sorted(m for (m, s), shards in self.shards.items() if s == site and len(shards) == 5)
            assert complete_models(self.path, site) == complete
            if complete:
                data = open_activations(self.path, site=site)
                assert data.model.values.tolist() == complete
                for model in complete:
                    np.testing.assert_array_equal(data.activation.sel(model=model).values, self.values[model, site])
        assert verify(self.path).ok

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


class TableMachine(RuleBasedStateMachine):
    """A feature store: appends, crashes in the middle of one, refusals."""

    @initialize()
    def create(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "features.zarr"
        self.held: dict[str, float] = {}

    @rule(step=st.integers(0, 6), value=st.floats(-5, 5, width=32))
    def append(self, step: int, value: float) -> None:
        model = f"rl@{step}"
        table = feature_table(model, value)
        if model in self.held:
            with pytest.raises(StoreError, match="already"):
                append_model(self.path, "features", table, provenance=PROVENANCE)
            return
        append_model(self.path, "features", table, provenance=PROVENANCE)
        self.held[model] = value

    @rule(step=st.integers(0, 6), n_arrays=st.integers(0, 12))
    def die(self, step: int, n_arrays: int) -> None:
        """The process ends before the commit, with some arrays grown, all, or none."""
        model = f"rl@{step}"
        if model in self.held:
            return
        where = "_grow" if self.held else "commit"
        real, whole = getattr(tables_module, where), tables_module.arrays_of

        def dying(*args: object, **options: object) -> None:
            if where == "_grow":
                tables_module.arrays_of = lambda *asked: dict(list(whole(*asked).items())[:n_arrays])
                real(*args)
            raise Crash

        setattr(tables_module, where, dying)
        try:
            with pytest.raises(Crash):
                append_model(self.path, "features", feature_table(model, 77.0), provenance=PROVENANCE)
        finally:
            setattr(tables_module, where, real)
            tables_module.arrays_of = whole

    @precondition(lambda self: getattr(self, "held", None))
    @rule()
    def refuse(self) -> None:
        with pytest.raises(StoreError, match="other prompts"):
            append_model(self.path, "features", feature_table("sft@1", prompts=("x", "y", "z")), provenance=PROVENANCE)
        with pytest.raises(StoreError, match="another study"):
            append_model(self.path, "features", feature_table("sft@1"), provenance=Provenance("two", "key-one"))

    @invariant()
    def holds_what_was_appended(self) -> None:
        if not hasattr(self, "path"):
            return
        assert committed_models(self.path) == list(self.held)
        if self.held:
            data = open_features(self.path)
            assert data["mean"].values[:, 0, 0].tolist() == [np.float32(value) for value in self.held.values()]
            assert data.model.values.tolist() == list(self.held)
            plain = xr.open_zarr(self.path)  # without this package: nothing half-grown is seen
            assert plain.model.values.tolist() == list(self.held)
            np.testing.assert_array_equal(plain["max"].values, data["mean"].values)
            report = verify(self.path)
            assert report.ok, report.problems

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestActivationMachine = ActivationMachine.TestCase
TestActivationMachine.settings = SETTINGS
TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = SETTINGS

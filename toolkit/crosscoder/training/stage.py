"""The crosscoder stage of a study: train the crosscoders that are not finished, then measure their health."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CLUSTER, TOKEN, TOKEN_ID
from rlgen_stats.schemas.errors import InputError, StageError, StoreError
from rlgen_stats.schemas.null_views import HALVES_MODEL
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import FLOOR_ARM, CrosscoderSpec, StudySpec
from rlgen_stats.stores import (
    PairedReader,
    Provenance,
    StudyFolder,
    open_activations,
    open_tokens,
    write_json,
)
from rlgen_stats.stores.atomic import explain_damage, read_object
from rlgen_stats.stores.crosscoder_weights import CURVE, SPEC, WEIGHTS
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.stores.health_records import HEALTH, READOUT_MODELS, add_readout, read_health
from rlgen_stats.stores.hub import is_on_hub, locate_table
from rlgen_stats.stores.labels import TokenLabels
from rlgen_stats.stores.study_models import final_model, list_models
from rlgen_stats.stores.table_files import table_sha256
from rlgen_stats.toolkit.crosscoder.data.halves import HalvesReader
from rlgen_stats.toolkit.crosscoder.data.live_activations import LiveActivations, live_corpus
from rlgen_stats.toolkit.crosscoder.data.paired import PairedActivations
from rlgen_stats.toolkit.crosscoder.data.text_bounds import spread, text_bounds
from rlgen_stats.toolkit.crosscoder.interop.foreign_weights import import_crosscoder
from rlgen_stats.toolkit.crosscoder.interop.layouts import weights_files
from rlgen_stats.toolkit.crosscoder.interop.saelens_weights import import_sae, sae_files
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.loading import load_crosscoder
from rlgen_stats.toolkit.crosscoder.training.ranks import join_ranks, rank_of_process
from rlgen_stats.toolkit.crosscoder.training.train import STATE, train_replicates, training_key
from rlgen_stats.toolkit.crosscoder.uses.fitted_readout import fit_readout
from rlgen_stats.toolkit.crosscoder.uses.health import Health, judge_again, measure_health
from rlgen_stats.toolkit.crosscoder.uses.readout_health import (
    ModelReadout,
    judge_readout,
    measure_readout,
    models_of_record,
    own_fve,
    own_l0,
)
from rlgen_stats.toolkit.crosscoder.uses.remedies import failures
from rlgen_stats.toolkit.crosscoder.uses.splice import SpliceCE, SplicedText, splice_ce
from rlgen_stats.toolkit.extraction import (
    find_model,
    load_model,
    resolve_device,
    resolve_view,
    site_name,
    usable_tokens,
)
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.tracking import check_trackers, tracking
from rlgen_stats.toolkit.workers import has_workers, kept, run_tasks

SPLICED_TEXTS: Final = 128
"""Texts on which activations are replaced by reconstructions, of many prompts and sources."""
SPLICED_TOKENS: Final = 1 << 14
"""Tokens of these texts, each read three times by every view's model; of long texts fewer are taken."""


def train_crosscoders(
    spec: StudySpec,
    folder: StudyFolder,
    *,
    provenance: Provenance,
    progress: Progress = SILENT,
    report_to: Sequence[str] = (),
) -> None:
    """Train every crosscoder of a study and measure its health; finished ones are kept.

    Parameters
    ----------
    spec, folder
        The study, with its activations stored.
    provenance
        Origin, noted in each spec.json.
    progress
        Receiver of progress, in tokens.
    report_to
        Trackers of the curves: wandb, tensorboard (files in the study's folder logs), trackio.

    Raises
    ------
    InputError
        If a tracker's package is missing or it does not start.
    StageError
        If there are no activations.
    StoreError
        If a view's activations are not complete, or a crosscoder's folder belongs to another study.

    Notes
    -----
    A crosscoder is finished when its recorded key, the hash of its spec, views, seed and data, equals the current one.
    An interrupted one resumes from its last saved state. In this process all replicates are trained in one pass over
    the data; on the workers of a cluster each is a task, and has the same weights. Under torchrun every process trains
    on its share of each batch and the first one measures.
    """
    if not folder.activations.exists():
        raise StageError(f"{folder.activations} is missing; run the extract stage before training crosscoders.")
    check_trackers(report_to)
    together = [(crosscoder, crosscoder.names) for crosscoder in spec.crosscoders]
    alone = [(crosscoder, (name,)) for crosscoder, names in together for name in names]
    tasks = [(spec, folder, provenance, report_to, *one) for one in (alone if has_workers() else together)]
    with run_tasks(_train_and_measure, tasks, progress=progress) as results:
        for lines in results:
            for line in lines:
                progress.log(line)


def _train_and_measure(
    study: StudySpec,
    folder: StudyFolder,
    provenance: Provenance,
    report_to: Sequence[str],
    spec: CrosscoderSpec,
    names: tuple[str, ...],
    progress: Progress = SILENT,
) -> list[str]:
    """Some replicates of a crosscoder; a line to be shown for each thing measured."""
    tokens, mask = kept(
        "tokens trained on", folder, lambda: (open_tokens(folder.activations), usable_tokens(study, folder))
    )
    return _StudyCrosscoder(
        study=study,
        folder=folder,
        spec=spec,
        names=names,
        tokens=tokens,
        mask=mask,
        provenance=provenance,
        progress=progress,
        report_to=report_to,
    ).train_and_measure()


def forget_crosscoders(spec: StudySpec, folder: StudyFolder) -> None:
    """Let every crosscoder of a study be trained again from its start; the old files stay until new ones replace them.

    Parameters
    ----------
    spec, folder
        The study.
    """
    for crosscoder in spec.crosscoders:
        for name in crosscoder.names:
            for file in (SPEC, STATE, HEALTH):
                (folder.crosscoder(name) / file).unlink(missing_ok=True)


class _StudyCrosscoder:
    """A crosscoder of a study: some of its replicates, what identifies their data, and what is on the disk of them."""

    def __init__(
        self,
        *,
        study: StudySpec,
        folder: StudyFolder,
        spec: CrosscoderSpec,
        names: tuple[str, ...],
        tokens: xr.Dataset,
        mask: NDArray[np.bool_],
        provenance: Provenance,
        progress: Progress,
        report_to: Sequence[str],
    ) -> None:
        self.report_to = report_to
        self.study, self.folder, self.spec, self.names = study, folder, spec, names
        self.tokens, self.mask, self.provenance, self.progress = tokens, mask, provenance, progress
        self.site = site_name(study.extraction.layer)
        self.device = resolve_device(study.device)
        self.views = tuple(resolve_view(view, study, folder) for view in spec.views)
        first = derive_seed(study.seed, "crosscoder", spec.name, spec.seed)
        others = [derive_seed(first, "replicate", number) for number in range(2, len(spec.names) + 1)]
        seeds = dict(zip(spec.names, [first, *others], strict=True))
        self.seeds = [seeds[name] for name in names]
        # Dictionaries are a sample of what training gives, its order of the data included; halves have one order.
        of_their_own = {seed: derive_seed(seed, "order") for seed in others if HALVES_MODEL not in self.views}
        self.orders = [of_their_own.get(seed) for seed in self.seeds]
        is_read = spec.name == study.primary_crosscoder.name and spec.readout != "joint"
        # a floor run may end where the dictionary describes nothing; no claim rests on its features
        judged = [ref.model for ref in list_models(study, folder) if ref.arm != FLOOR_ARM]
        self.judged_models = judged if is_read else []
        self.contrasted = [final_model(study, folder, run.name).model for run in study.all_contrasted]
        self.folders = [folder.crosscoder(name) for name in names]
        self.order_seed = derive_seed(first, "order")
        self.corpus = None if spec.corpus is None else locate_table(spec.corpus, folder)
        labels = [tokens.attrs.get(name) for name in ("study_id", "spec_hash", "labels_hash")]
        if self.corpus is not None and not (is_on_hub(str(spec.corpus)) or self.corpus.exists()):
            raise InputError(f"no corpus at {self.corpus}; correct crosscoders.{spec.name}.corpus in study.yaml.")
        data = content_hash(np.packbits(mask).tobytes().hex()) if self.corpus is None else table_sha256(self.corpus)
        self.data_hash = content_hash([*labels, self.site, data])

    def train_and_measure(self) -> list[str]:
        """Train the replicates that are not finished, together, and measure those that are not measured."""
        if self.spec.weights is not None and rank_of_process():
            return []  # importing and measuring is one process's work
        stored = self._reader(self.views)
        crosscoders = [self._imported(stored.n_tokens)] if self.spec.weights is not None else self._trained(stored)
        if rank_of_process():
            return []  # so is measuring after training together
        lines = []
        for name, folder, crosscoder in zip(self.names, self.folders, crosscoders, strict=True):
            if self.spec.readout == "fit" and crosscoder.fit_weight is None:
                fit_readout(crosscoder, stored).save(folder)
            lines += [f"crosscoder {name}: {found}" for found in self._measure(name, folder, crosscoder, stored)]
        return lines

    def _reader(
        self, models: tuple[str, ...], *, clusters: NDArray[np.str_] | None = None, batch_size: int | None = None
    ) -> PairedReader:
        """Stored activations of these models at the tokens trained on, or those of some clusters of prompts."""
        return PairedReader(
            self.folder.activations,
            models,
            self.site,
            batch_size=batch_size or self.spec.batch_size,
            seed=self.order_seed,
            mask=self.mask,
            where=None if clusters is None else {CLUSTER: clusters.tolist()},
        )

    def _trained(self, stored: PairedReader) -> list[Crosscoder]:
        """All replicates; those that are not finished are trained in one pass over the data."""
        crosscoders: dict[int, Crosscoder] = {}
        for number, (folder, seed, order) in enumerate(zip(self.folders, self.seeds, self.orders, strict=True)):
            key = training_key(self.spec, self.views, seed=seed, order=order, data_hash=self.data_hash)
            finished = self._load_finished(folder, key)
            if finished is not None:
                crosscoders[number] = finished
        missing = [number for number in range(len(self.seeds)) if number not in crosscoders]
        if missing:
            data = self._training_data(stored)
            first = join_ranks(self.device).rank == 0  # before a tracker asks which process it is in
            with tracking(
                self.report_to if first else (),
                self.names[0],
                project=self.study.name,
                settings=self.spec.model_dump(mode="json"),
                logs=self.folder.root / "logs",
            ) as report:
                trained = train_replicates(
                    data,
                    self.spec,
                    views=self.views,
                    seeds=[self.seeds[number] for number in missing],
                    orders=[self.orders[number] for number in missing],
                    device=self.device,
                    folders=[self.folders[number] for number in missing],
                    progress=self.progress,
                    data_hash=self.data_hash,
                    facts=self._origin(),
                    report=report,
                )
            crosscoders |= dict(zip(missing, trained, strict=True))
        return [crosscoders[number] for number in range(len(self.seeds))]

    def _training_data(self, stored: PairedReader) -> PairedActivations:
        if self.corpus is not None:
            return self._live(self.corpus)
        if HALVES_MODEL not in self.views:
            return stored
        clusters = np.unique(np.asarray(TokenLabels(self.folder.activations).legend(CLUSTER)))
        clusters = np.random.default_rng(derive_seed(self.order_seed, "halves")).permutation(clusters)
        size, middle = self.spec.batch_size, len(clusters) // 2
        halves = ((clusters[:middle], size // 2), (clusters[middle:], size - size // 2))
        return HalvesReader(*(self._reader(self.views, clusters=part, batch_size=rows) for part, rows in halves))

    def _imported(self, n_tokens: int) -> Crosscoder:
        """The crosscoder with weights trained elsewhere, its inference rule unchanged."""
        folder = self.folders[0]
        source = self.folder.resolve(str(self.spec.weights))
        is_ours = (source / SPEC).exists()
        files = [source / WEIGHTS] if is_ours else sae_files(source) or weights_files(source)
        key = content_hash(["weights", *(file_sha256(file) for file in files), list(self.views)])
        finished = self._load_finished(folder, key)
        if finished is not None:
            return finished
        if is_ours:
            crosscoder = load_crosscoder(source)
            if crosscoder.views != self.views:
                raise StoreError(
                    f"{source} has the views {', '.join(crosscoder.views)}, but crosscoder {self.spec.name!r} of "
                    f"study.yaml has {', '.join(self.views)}; they must be the same in the same order."
                )
        else:
            crosscoder = (import_sae if sae_files(source) else import_crosscoder)(source, self.views)
        if crosscoder.n_features != self.spec.n_features:
            raise StoreError(
                f"{source} has {crosscoder.n_features} features, but study.yaml says n_features: "
                f"{self.spec.n_features} for crosscoder {self.spec.name!r}; write the number the weights have."
            )
        crosscoder.name, crosscoder.default_readout = self.spec.name, self.spec.readout
        crosscoder.fit_weight = crosscoder.fit_bias = None  # fitted to this study's activations, not to theirs
        crosscoder.facts |= {"key": key, "data_tokens": n_tokens, **self._origin()}
        crosscoder.save(folder)
        write_json(folder / CURVE, [])
        return crosscoder.to(self.device)

    def _origin(self) -> dict[str, str]:
        return {"study_id": self.provenance.study_id, "spec_hash": self.provenance.spec_hash, "site": self.site}

    def _live(self, corpus: Path) -> LiveActivations:
        return live_corpus(
            self.study,
            self.folder,
            self.views,
            corpus,
            batch_size=self.spec.batch_size,
            seed=self.order_seed,
        )

    def _measure(self, name: str, folder: Path, crosscoder: Crosscoder, reader: PairedReader) -> list[str]:
        if self._is_measured(folder, crosscoder):
            with explain_damage(folder / HEALTH):
                models: Sequence[ModelReadout] = models_of_record(read_health(folder))
                health = judge_again(crosscoder, folder)  # an earlier version may have had other limits
            found = ["up to date"]
        else:
            losses = self._splice_losses(crosscoder)
            health = measure_health(crosscoder, reader, readout=self.spec.readout, ce=losses, folder=folder)
            models = self._readout_models(name, crosscoder)
            found = []
        found.append("healthy" if health.healthy else "failed its health check")
        found += [self._judge_readout(folder, crosscoder, health, models)] if self.judged_models else []
        return found + [f"  {line}" for line in failures(folder, read_health(folder))]

    def _readout_models(self, name: str, crosscoder: Crosscoder) -> Sequence[ModelReadout]:
        """Measure the readout on base and every checkpoint, pair by pair: memory holds two models' activations."""
        if not self.judged_models:
            return ()
        base, *others = self.judged_models
        models: list[ModelReadout] = []
        with self.progress.task(f"readout {name}", total=len(others), unit="models") as task:
            for other in others:
                pair = self._reader((base, other))
                of_base, of_other = measure_readout(crosscoder, pair, (base, other), readout=self.spec.readout)
                models += [of_other] if models else [of_base, of_other]
                task.advance(1, model=other, dfve=of_other.dfve)
        return models

    def _judge_readout(
        self, folder: Path, crosscoder: Crosscoder, health: Health, models: Sequence[ModelReadout]
    ) -> str:
        judged = judge_readout(
            crosscoder,
            models,
            own_fve=own_fve(crosscoder, health),
            own_l0=own_l0(crosscoder, health),
            contrasted=self.contrasted,
            readout=self.spec.readout,
        )
        add_readout(folder, judged.describe())
        return f"readout {self.spec.readout} {'failed its health check' if judged.reasons else 'passed'}"

    def _load_finished(self, folder: Path, key: str) -> Crosscoder | None:
        """The crosscoder in ``folder`` if it was trained under this key; None if there is none or another key's."""
        if not (folder / SPEC).exists() or not (folder / WEIGHTS).exists():
            return None
        facts = read_object(folder / SPEC).get("facts", {})
        if facts.get("study_id") != self.provenance.study_id:
            raise StoreError(
                f"{folder} holds a crosscoder of another study ({str(facts.get('study_id'))[:12]}, this one is "
                f"{self.provenance.study_id[:12]}); it is left untouched: use another folder or move it away."
            )
        if facts.get("key") != key:
            return None
        crosscoder = load_crosscoder(folder, device=self.device)
        if crosscoder.default_readout != self.spec.readout:  # no part of the key: a readout is declared, not trained
            crosscoder.default_readout = self.spec.readout
            crosscoder.save(folder)
        return crosscoder

    def _is_measured(self, folder: Path, crosscoder: Crosscoder) -> bool:
        if not (folder / HEALTH).exists():
            return False
        record = read_health(folder)
        same = record.get("weights_sha256") == crosscoder.weights_sha256 and record.get("readout") == self.spec.readout
        readout = record.get(READOUT_MODELS, {})
        judged = [[one["model"] for one in readout.get("models", [])], readout.get("contrasted", [])]
        return bool(same and judged == ([self.judged_models, self.contrasted] if self.judged_models else [[], []]))

    @torch.no_grad()
    def _splice_losses(self, crosscoder: Crosscoder) -> dict[str, SpliceCE]:
        """Losses of every view's model with its activations replaced by reconstructions from the joint code."""
        bounds = text_bounds(self.tokens)
        # the last token of a text has no successor to be scored on, so a text needs a masked token before it
        bounds = bounds[[bool(self.mask[start : end - 1].any()) for start, end in bounds]]
        affordable = int(SPLICED_TOKENS / np.diff(bounds).mean())
        bounds = bounds[spread(len(bounds), min(SPLICED_TEXTS, max(8, affordable)))]
        masks = [self.mask[start:end] for start, end in bounds]
        rows = np.concatenate([np.arange(start, end) for start, end in bounds])
        cuts = np.cumsum(bounds[:, 1] - bounds[:, 0])[:-1]
        ids = np.split(self.tokens[TOKEN_ID].values[rows], cuts)
        joint = crosscoder.has_joint_code
        views = [self._activations(view, rows) for view in self.views] if joint else []
        code = crosscoder.encode(crosscoder.normalise(views)) if joint else None
        losses = {}
        with self.progress.task(f"splice {self.spec.name}", total=len(self.views), unit="models") as task:
            for slot, view in enumerate(self.views):
                f = crosscoder.readout(self._activations(view, rows)) if code is None else code
                replacements = np.split(crosscoder.reconstruct(f, view, joint=joint).cpu().numpy(), cuts)
                losses[view] = splice_ce(
                    load_model(find_model(view, self.study, self.folder), device=self.device),
                    self.study.extraction.layer,
                    [SplicedText(*parts) for parts in zip(ids, replacements, masks, strict=True)],
                    constant=crosscoder.split(crosscoder.means[None])[slot][0].cpu().numpy(),
                )
                task.advance(1, model=view, ce_increase=losses[view].increase)
        return losses

    def _activations(self, view: str, rows: NDArray[np.int64]) -> torch.Tensor:
        """Raw [token, channel]."""
        stored = open_activations(self.folder.activations, models=[view], site=self.site)["activation"][0]
        return torch.from_numpy(stored.isel({TOKEN: rows}).values.astype(np.float32)).to(self.device)

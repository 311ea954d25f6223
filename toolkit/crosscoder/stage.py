"""The crosscoder stage of a study: train what is not trained, then measure health."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CHANNEL, MODEL, TOKEN, TOKEN_ID
from rlgen_stats.schemas.errors import StageError, StoreError
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import CrosscoderSpec, StudySpec
from rlgen_stats.stores import PairedReader, Provenance, StudyFolder, open_activations, open_tokens, read_json
from rlgen_stats.toolkit.crosscoder.health import HEALTH, measure_health
from rlgen_stats.toolkit.crosscoder.model import SPEC, WEIGHTS, Crosscoder, load_crosscoder
from rlgen_stats.toolkit.crosscoder.splice import SpliceCE, SplicedText, splice_ce
from rlgen_stats.toolkit.crosscoder.texts import spread, text_bounds
from rlgen_stats.toolkit.crosscoder.training import train_crosscoder, training_key
from rlgen_stats.toolkit.extraction import (
    find_model,
    load_model,
    resolve_device,
    resolve_view,
    site_name,
    token_mask,
)
from rlgen_stats.toolkit.progress import SILENT, Progress

SPLICED_TEXTS: Final = 128
"""Texts on which reconstructions are put back: a mean loss over some thousand tokens is steady to a few percent."""


def train_crosscoders(
    spec: StudySpec, folder: StudyFolder, *, provenance: Provenance, progress: Progress = SILENT
) -> None:
    """Train every crosscoder of a study and measure its health; finished ones are kept.

    Parameters
    ----------
    spec, folder
        The study, with its activations stored.
    provenance
        Origin, noted in each spec.json.
    progress
        Receiver of progress, in steps.

    Raises
    ------
    StageError
        If there are no activations.
    StoreError
        If a view's activations are not complete, or a crosscoder's folder belongs to another study.

    Notes
    -----
    A crosscoder is finished when its recorded key, the hash of its spec, views, seed and data, is the present one.
    An interrupted one goes on from its last saved state.
    """
    if not folder.activations.exists():
        raise StageError(f"{folder.activations} is missing; run the extract stage before training crosscoders.")
    tokens = open_tokens(folder.activations)
    mask = token_mask(tokens, spec.extraction, purpose="train")
    for crosscoder in spec.crosscoders:
        _CrosscoderJob(spec, folder, crosscoder, tokens, mask, provenance, progress).run()


class _CrosscoderJob:
    """One crosscoder of one study."""

    def __init__(
        self,
        study: StudySpec,
        folder: StudyFolder,
        spec: CrosscoderSpec,
        tokens: xr.Dataset,
        mask: NDArray[np.bool_],
        provenance: Provenance,
        progress: Progress,
    ) -> None:
        self.study, self.folder, self.spec = study, folder, spec
        self.tokens, self.mask, self.provenance, self.progress = tokens, mask, provenance, progress
        self.place = folder.crosscoder(spec.name)
        self.site = site_name(study.extraction.layer)
        self.device = resolve_device(study.device)
        self.views = tuple(resolve_view(view, study, folder) for view in spec.views)
        self.seed = derive_seed(study.seed, "crosscoder", spec.name, spec.seed)
        identity = [tokens.attrs.get(name) for name in ("study_id", "spec_hash", "labels_hash")]
        self.data_hash = content_hash([*identity, self.site, content_hash(np.packbits(mask).tobytes().hex())])

    def run(self) -> None:
        reader = PairedReader(
            self.folder.activations,
            self.views,
            self.site,
            batch_size=self.spec.batch_size,
            seed=derive_seed(self.seed, "order"),
            mask=self.mask,
        )
        crosscoder = self._finished(reader.n_tokens)
        if crosscoder is None:
            facts = {"study_id": self.provenance.study_id, "spec_hash": self.provenance.spec_hash, "site": self.site}
            crosscoder = train_crosscoder(
                reader,
                self.spec,
                views=self.views,
                seed=self.seed,
                device=self.device,
                folder=self.place,
                progress=self.progress,
                data_hash=self.data_hash,
                facts=facts,
            )
        if self._measured(crosscoder):
            self.progress.log(f"crosscoder {self.spec.name}: up to date")
            return
        losses = self._splice(crosscoder)
        health = measure_health(crosscoder, reader, readout=self.spec.readout, ce=losses, folder=self.place)
        self.progress.log(f"crosscoder {self.spec.name}: {'healthy' if health.healthy else health.reasons}")

    def _finished(self, n_tokens: int) -> Crosscoder | None:
        """The trained crosscoder if it is the one asked for; None if there is none or it was superseded."""
        if not (self.place / SPEC).exists() or not (self.place / WEIGHTS).exists():
            return None
        facts = read_json(self.place / SPEC).get("facts", {})
        if facts.get("study_id") != self.provenance.study_id:
            raise StoreError(
                f"{self.place} holds a crosscoder of another study ({str(facts.get('study_id'))[:12]}, this one is "
                f"{self.provenance.study_id[:12]}); it is left untouched: use another folder or move it away."
            )
        key = training_key(self.spec, self.views, seed=self.seed, n_tokens=n_tokens, data_hash=self.data_hash)
        if facts.get("key") != key:
            return None
        crosscoder = load_crosscoder(self.place, device=self.device)
        if crosscoder.default_readout != self.spec.readout:  # a readout is declared, not trained
            crosscoder.default_readout = self.spec.readout
            crosscoder.save(self.place)
        return crosscoder

    def _measured(self, crosscoder: Crosscoder) -> bool:
        if not (self.place / HEALTH).exists():
            return False
        record = read_json(self.place / HEALTH)
        same = record.get("weights_sha256") == crosscoder.weights_sha256
        return bool(same and record.get("readout") == self.spec.readout)

    def _splice(self, crosscoder: Crosscoder) -> dict[str, SpliceCE]:
        """Cross-entropy of every view with its reconstruction from the joint code put back."""
        bounds = text_bounds(self.tokens)
        bounds = bounds[[bool(self.mask[start : end - 1].any()) for start, end in bounds]]
        bounds = bounds[spread(len(bounds), SPLICED_TEXTS)]
        where = np.concatenate([np.arange(start, end) for start, end in bounds])
        stored = open_activations(self.folder.activations, models=list(self.views), site=self.site)["activation"]
        raw = stored.isel({TOKEN: where}).transpose(TOKEN, MODEL, CHANNEL).values.astype(np.float32)
        ids = self.tokens[TOKEN_ID].values[where]
        cuts = np.cumsum(bounds[:, 1] - bounds[:, 0])[:-1]
        losses = {}
        with torch.no_grad():
            f = crosscoder.encode(crosscoder.normalise(torch.from_numpy(raw).to(self.device)))
        with self.progress.task(f"splice {self.spec.name}", total=len(self.views), unit="models") as task:
            for slot, view in enumerate(self.views):
                with torch.no_grad():
                    back = crosscoder.reconstruct(f, view).cpu().numpy()
                parts = zip(np.split(ids, cuts), np.split(back, cuts), np.split(self.mask[where], cuts), strict=True)
                model = load_model(find_model(view, self.study, self.folder), device=self.device)
                losses[view] = splice_ce(
                    model,
                    self.study.extraction.layer,
                    [SplicedText(*part) for part in parts],
                    constant=crosscoder.mean[slot].cpu().numpy(),
                )
                task.advance(1, model=view, ce_increase=losses[view].increase)
        return losses

"""Sparse codes shared by several models: training, health, readouts, prompt summaries, contexts and promoted tokens."""

from rlgen_stats.toolkit.crosscoder.data.live_activations import LiveActivations
from rlgen_stats.toolkit.crosscoder.data.paired import ArrayReader, PairedActivations
from rlgen_stats.toolkit.crosscoder.interop.decoder_dataset import decoder_dataset
from rlgen_stats.toolkit.crosscoder.interop.foreign_weights import export_crosscoder, import_crosscoder
from rlgen_stats.toolkit.crosscoder.interop.hub_repository import pull_crosscoder, push_crosscoder
from rlgen_stats.toolkit.crosscoder.interop.saelens_weights import export_saes, import_sae
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.loading import load_crosscoder
from rlgen_stats.toolkit.crosscoder.model.readout import FeatureReadout
from rlgen_stats.toolkit.crosscoder.training.ranks import rank_of_process
from rlgen_stats.toolkit.crosscoder.training.stage import forget_crosscoders, train_crosscoders
from rlgen_stats.toolkit.crosscoder.training.train import train_crosscoder, train_replicates
from rlgen_stats.toolkit.crosscoder.uses.agreement import agreement_sums
from rlgen_stats.toolkit.crosscoder.uses.contexts import write_contexts
from rlgen_stats.toolkit.crosscoder.uses.encode import encode_features, summarise_prompts
from rlgen_stats.toolkit.crosscoder.uses.fitted_readout import fit_readout
from rlgen_stats.toolkit.crosscoder.uses.health import Health, health_dataset, measure_health, require_healthy
from rlgen_stats.toolkit.crosscoder.uses.promoted_tokens import logit_effects, write_logits
from rlgen_stats.toolkit.crosscoder.uses.readout_health import (
    ModelReadout,
    ReadoutHealth,
    judge_readout,
    measure_readout,
)
from rlgen_stats.toolkit.crosscoder.uses.scaling_sums import scaling_sums, stored_scaling_sums
from rlgen_stats.toolkit.crosscoder.uses.splice import SpliceCE, SplicedText, splice_ce

__all__ = [
    "ArrayReader",
    "Crosscoder",
    "FeatureReadout",
    "Health",
    "LiveActivations",
    "ModelReadout",
    "PairedActivations",
    "ReadoutHealth",
    "SpliceCE",
    "SplicedText",
    "agreement_sums",
    "decoder_dataset",
    "encode_features",
    "export_crosscoder",
    "export_saes",
    "fit_readout",
    "forget_crosscoders",
    "health_dataset",
    "import_crosscoder",
    "import_sae",
    "judge_readout",
    "load_crosscoder",
    "logit_effects",
    "measure_health",
    "measure_readout",
    "pull_crosscoder",
    "push_crosscoder",
    "rank_of_process",
    "require_healthy",
    "scaling_sums",
    "splice_ce",
    "stored_scaling_sums",
    "summarise_prompts",
    "train_crosscoder",
    "train_crosscoders",
    "train_replicates",
    "write_contexts",
    "write_logits",
]

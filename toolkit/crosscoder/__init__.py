"""Sparse codes shared by several models: training, health, readout to prompt summaries, and what features look like."""

from rlgen_stats.toolkit.crosscoder.contexts import write_contexts
from rlgen_stats.toolkit.crosscoder.encode import encode_features, summarise_prompts
from rlgen_stats.toolkit.crosscoder.export import decoder_dataset
from rlgen_stats.toolkit.crosscoder.foreign import export_crosscoder, import_crosscoder
from rlgen_stats.toolkit.crosscoder.health import Health, health_dataset, measure_health, require_healthy
from rlgen_stats.toolkit.crosscoder.live import LiveActivations
from rlgen_stats.toolkit.crosscoder.loading import load_crosscoder
from rlgen_stats.toolkit.crosscoder.logits import logit_effects, write_logits
from rlgen_stats.toolkit.crosscoder.model import Crosscoder
from rlgen_stats.toolkit.crosscoder.ranks import rank_of_process
from rlgen_stats.toolkit.crosscoder.reader import ArrayReader, PairedActivations
from rlgen_stats.toolkit.crosscoder.readout import FeatureReadout
from rlgen_stats.toolkit.crosscoder.scaling import scaling_sums, stored_scaling_sums
from rlgen_stats.toolkit.crosscoder.splice import SpliceCE, SplicedText, splice_ce
from rlgen_stats.toolkit.crosscoder.stage import forget_crosscoders, train_crosscoders
from rlgen_stats.toolkit.crosscoder.training import train_crosscoder, train_replicates

__all__ = [
    "ArrayReader",
    "Crosscoder",
    "FeatureReadout",
    "Health",
    "LiveActivations",
    "PairedActivations",
    "SpliceCE",
    "SplicedText",
    "decoder_dataset",
    "encode_features",
    "export_crosscoder",
    "forget_crosscoders",
    "health_dataset",
    "import_crosscoder",
    "load_crosscoder",
    "logit_effects",
    "measure_health",
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

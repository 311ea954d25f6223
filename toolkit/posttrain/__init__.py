"""Post-training with TRL: supervised fine-tuning and GRPO from one base, with an evenly spaced checkpoint schedule."""

from rlgen_stats.toolkit.posttrain.arguments import trainer_arguments
from rlgen_stats.toolkit.posttrain.data import load_training_table
from rlgen_stats.toolkit.posttrain.rewards import FinalAnswerReward
from rlgen_stats.toolkit.posttrain.run import train_run
from rlgen_stats.toolkit.posttrain.schedule import checkpoint_steps

__all__ = ["FinalAnswerReward", "checkpoint_steps", "load_training_table", "train_run", "trainer_arguments"]

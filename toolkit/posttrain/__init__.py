"""Post-training with TRL: supervised fine-tuning and GRPO from one base, checkpoints evenly or geometrically spaced."""

from rlgen_stats.toolkit.posttrain.arguments import trainer_arguments
from rlgen_stats.toolkit.posttrain.rewards import GradedReward
from rlgen_stats.toolkit.posttrain.schedule import checkpoint_steps
from rlgen_stats.toolkit.posttrain.train_run import train_run
from rlgen_stats.toolkit.posttrain.training_prompts import load_training_table

__all__ = ["GradedReward", "checkpoint_steps", "load_training_table", "train_run", "trainer_arguments"]

"""The embedded study: a synthetic world with the structure of the paper, small enough for a laptop."""

from rlgen_stats.toolkit.demo.prepare import demo_spec, prepare_demo
from rlgen_stats.toolkit.demo.pretrain import BaseSettings, pretrain_base
from rlgen_stats.toolkit.demo.prompt_tables import evaluation_prompts, neutral_texts, training_prompts, trivia_prompts
from rlgen_stats.toolkit.demo.world import World

__all__ = [
    "BaseSettings",
    "World",
    "demo_spec",
    "evaluation_prompts",
    "neutral_texts",
    "prepare_demo",
    "pretrain_base",
    "training_prompts",
    "trivia_prompts",
]

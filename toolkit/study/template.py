"""The commented study.yaml that ``rlgen-stats init`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rlgen_stats.schemas.dims import check_name
from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.stores import StudyFolder, replacing

_TEMPLATE: Final = """\
# A study of rlgen-stats: one base, runs post-trained from it, prompts to compare them on.
# Paths are absolute or relative to this folder. Unknown keys are refused; 'rlgen-stats schema study' lists all keys.
schema_version: 1
name: {name}
seed: 0
device: auto                      # cuda where present, else cpu

base:
  path: models/base               # a Hugging Face checkpoint folder

runs:                             # checkpoints you already have (TRL, verl, LLaMA-Factory; LoRA adapters too): two or
                                  # more a run, five or more to see when features stop changing
  - name: sft
    arm: sft                      # replicates of one kind of training share an arm
    method: checkpoints           # or 'sft' / 'grpo' / 'pretrain' to train here with TRL from data.train
    checkpoints: {{20: models/sft/step-20, 40: models/sft/step-40}}
  - name: rl
    arm: rl
    method: checkpoints
    checkpoints: {{100: models/rl/step-100, 200: models/rl/step-200}}
    # chat_template: checkpoint   # of base or a run: reads prompts by its tokenizer's chat template, or by a Jinja file
    # system: Be brief.
    # chat_template_kwargs: {{enable_thinking: false}}
  # - name: rl
  #   arm: rl
  #   method: grpo
  #   n_checkpoints: 5
  #   schedule: geometric         # early checkpoints, so that the run that moves fast can be compared at equal shift
  #   trainer: {{learning_rate: 1.0e-6, num_generations: 8, max_steps: 200}}   # GRPOConfig's own names
contrast: [sft, rl]               # the two runs compared, SFT first; several pairs: contrasts: [[sft, rl], [dpo, rl]]

data:
  prompts: data/prompts.csv       # prompt_id, text, answer, task, domain (in|out); optional split, cluster
  train: null                     # text, answer and, for SFT, completion; only to train here

generation: {{max_new_tokens: 512, n_samples: 4, temperature: 1.0, batch_size: 64}}
grader: {{name: math}}              # or final_answer: text after the last marker equals the answer
extraction: {{layer: 18, dtype: bfloat16, batch_size: 16}}   # middle decoder block, counted from 0

crosscoders:
  - name: main                    # its features are followed, selected and edited
    views: [base@0, sft@final, rl@final]
    sparsity: batchtopk
    n_features: 32768
    k: 64
    steps: 50000
    objective: both               # half of every batch trains on single models and on the differences between them
    replicates: 3                 # dictionaries from other initial weights: analysed together, with their variance
  - name: main-l1
    views: [base@0, sft@final, rl@final]
    sparsity: l1                  # the paper's rule; it shrinks reconstructions, latent scaling shows of which features
    accept_unhealthy: true
    n_features: 32768
    steps: 50000
  - {{name: pair-sft, views: [base@0, sft@final], k: 64, n_features: 32768, steps: 50000}}
  - {{name: pair-rl, views: [base@0, rl@final], k: 64, n_features: 32768, steps: 50000}}
  # floors: what no difference looks like. base@repeat, base read again, is zero by construction; these can fail
  - {{name: 'null', views: [base@0, base@halves], k: 64, n_features: 32768, steps: 50000}}   # disjoint prompts
  # - {{name: noise, views: [base@0, sft@noise], k: 64, n_features: 32768, steps: 50000}}   # noise of SFT's shift
  # where the final models are unequally far from base, C1 compares the run that moved far at its early checkpoints:
  # - {{name: pair-sft-early, views: [base@0, sft@20], k: 64, n_features: 32768, steps: 50000}}

selection:
  held_out_tasks: []              # tasks never used in selection
  control_tasks: []               # name unrelated tasks that base answers (one time in five or more, 200 prompts):
                                  # only there can a trial show that an edit has no side effects
intervention: {{n_controls: 99, max_prompts: 400}}
"""

_PROMPTS: Final = (
    "prompt_id,text,answer,task,domain\n"
    "math-0001,What is 7 + 5?,12,math,in\n"
    "sciq-0001,Which gas do plants take in?,carbon dioxide,sciq,out\n"
)


def write_template(root: Path, name: str) -> Path:
    """Write study.yaml and an example data/prompts.csv into ``root``.

    Raises
    ------
    SpecError
        If there is a study.yaml already; it is left alone.
    """
    folder = StudyFolder(root)
    check_name(name, "a study name")
    if folder.spec.exists():
        raise SpecError(f"{folder.spec} exists already; edit it, or start in another folder.")
    with replacing(folder.spec) as temporary:
        temporary.write_text(_TEMPLATE.format(name=name), encoding="utf-8")
    prompts = root / "data" / "prompts.csv"
    if not prompts.exists():
        with replacing(prompts) as temporary:
            temporary.write_text(_PROMPTS, encoding="utf-8")
    return folder.spec

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
models: {{dtype: auto}}             # as base is stored (bfloat16: 1% noise on activations); float32: exact and larger
                                  # device_map: auto spreads layers over GPUs; attn_implementation: sdpa, eager, ...

base:
  path: models/base               # a Hugging Face checkpoint folder, or hf://OWNER/NAME[@REVISION][/SUBFOLDER]

runs:                             # checkpoints you already have (TRL, verl, LLaMA-Factory; LoRA adapters too): two or
                                  # more a run, five or more to see when features stop changing
  - name: sft
    arm: sft                      # replicates of one kind of training share an arm
    method: checkpoints           # or 'sft' / 'grpo' / 'pretrain' to train here with TRL from data.train
    checkpoints: {{20: models/sft/step-20, 40: models/sft/step-40}}
  - name: rl
    arm: rl
    method: checkpoints
    checkpoints: {{100: models/rl/step-100, 200: models/rl/step-200}}   # or a pattern: runs/rl/global_step_*/hf
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
                                  # n_samples: {{final: 4, others: 0}} spares the checkpoints before a run's last one
tasks:                            # how each is graded, and its domain, role, template, stop strings, choices, file;
                                  # ready-made ones: rlgen-stats tasks
  math: {{grader: math}}            # the last box, else the last formula, equal in value
  sciq: {{grader: exact}}           # words; others: choice, choice_loglik, final_answer, regex, a function of your own
extraction: {{layer: middle, dtype: bfloat16, batch_size: 16}}   # or a fraction of the depth, a block from 0 on;
                                  # several: layers: [0.25, middle, 0.75]

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

# A task with 'role: held_out' is never used in selection. Give unrelated tasks that base answers 'role: control' (one
# time in five or more, 200 prompts): only there can a trial show that an edit has no side effects.
intervention: {{n_controls: 99, max_prompts: 400}}
"""

EXAMPLE_PROMPTS: Final = "data/prompts.csv"
_PROMPTS: Final = (
    "prompt_id,text,answer,task,domain\n"
    "math-0001,What is 7 + 5?,12,math,in\n"
    "sciq-0001,Which gas do plants take in?,carbon dioxide,sciq,out\n"
)


_EXAMPLE: Final = (
    "  prompts: data/prompts.csv ",
    " " * 34 + "# ready-made ones:",
    "  math: {grader",
    "  sciq: {grader",
)
"""How the lines of study.yaml begin that are about the example prompts."""


def without_example(text: str, prompts: Path) -> str | None:
    """The text of a study.yaml without the example prompts and their tasks.

    Parameters
    ----------
    text
        Of a study.yaml.
    prompts
        The study's data/prompts.csv.

    Returns
    -------
    str or None
        None where the file or these lines are no longer as ``write_template`` wrote them.
    """
    template = _TEMPLATE.replace("{{", "{").replace("}}", "}")
    written = [line for line in template.splitlines(keepends=True) if line.startswith(_EXAMPLE)]
    kept = [line for line in text.splitlines(keepends=True) if line not in written]
    is_example = prompts.is_file() and prompts.read_text(encoding="utf-8") == _PROMPTS
    return "".join(kept) if is_example and len(text.splitlines()) - len(kept) == len(written) else None


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
    prompts = root / EXAMPLE_PROMPTS
    if not prompts.exists():
        with replacing(prompts) as temporary:
            temporary.write_text(_PROMPTS, encoding="utf-8")
    return folder.spec

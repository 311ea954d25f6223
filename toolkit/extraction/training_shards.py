"""Checkpoints that a training left in shards, recognised by their files, and the command that merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_VERL: Final = "python -m verl.model_merger merge --backend {backend} --local_dir {shards} --target_dir {merged}"
_ZERO: Final = "python {shards}/zero_to_fp32.py {shards} {merged}"
_KINDS: Final = (
    ("model_world_size_*_rank_*.pt", _VERL.replace("{backend}", "fsdp")),
    ("dist_ckpt", _VERL.replace("{backend}", "megatron")),
    ("zero_to_fp32.py", _ZERO),
    ("global_step*/*zero_pp_rank_*", _ZERO.replace("{shards}/zero_to_fp32.py", "-m deepspeed.utils.zero_to_fp32")),
    ("pytorch_model_fsdp_0", "accelerate merge-weights {shards}/pytorch_model_fsdp_0 {merged}"),
)
"""Files of verl (FSDP and Megatron), DeepSpeed and accelerate's FSDP, and what merges them."""


def merge_command(folder: Path) -> str | None:
    """The command that merges a folder's shards into weights that transformers loads, None where there are none.

    Shards may lie in verl's ``actor`` below the folder, or beside it where the folder is the ``huggingface`` or
    ``global_step*`` one within the checkpoint.

    References
    ----------
    https://verl.readthedocs.io (checkpoints), https://www.deepspeed.ai (``zero_to_fp32.py``)
    """
    for shards in (folder, folder / "actor", folder.parent):
        for pattern, command in _KINDS:
            if any(shards.glob(pattern)):
                return command.format(shards=shards, merged=shards / "merged")
    return None

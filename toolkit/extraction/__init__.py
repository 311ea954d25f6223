"""From models to stores: completions, grades, forced-text activations, distances from base."""

from typing import TYPE_CHECKING, Final

from rlgen_stats.toolkit.lazy_names import lazy_names

if TYPE_CHECKING:
    from rlgen_stats.schemas.dims import FORMAT_CLASSES
    from rlgen_stats.schemas.null_views import REPEAT_MODEL
    from rlgen_stats.stores.prompts import load_prompts, load_texts
    from rlgen_stats.stores.study_models import (
        ModelRef,
        final_model,
        find_model,
        list_models,
        resolve_view,
    )
    from rlgen_stats.stores.table_files import read_table
    from rlgen_stats.toolkit.extraction.activations import LayerStore, extract_activations, site_name, token_mask
    from rlgen_stats.toolkit.extraction.checkpoints import load_model, load_tokenizer, resolve_device
    from rlgen_stats.toolkit.extraction.generation import Completion, generate
    from rlgen_stats.toolkit.extraction.grading import Grade, Grader, make_grader
    from rlgen_stats.toolkit.extraction.movement import measure_movement
    from rlgen_stats.toolkit.extraction.outcomes import read_completions, sample_outcomes
    from rlgen_stats.toolkit.extraction.rendering import (
        PromptReader,
        RenderedExample,
        check_tokenizers,
        load_reader,
        rendered_examples,
    )
    from rlgen_stats.toolkit.extraction.residual_stream import (
        block_output,
        capture_residual,
        locate_layers,
        name_layers,
        read_residual,
    )
    from rlgen_stats.toolkit.extraction.token_filter import usable_tokens

__all__ = [
    "FORMAT_CLASSES",
    "REPEAT_MODEL",
    "Completion",
    "Grade",
    "Grader",
    "LayerStore",
    "ModelRef",
    "PromptReader",
    "RenderedExample",
    "block_output",
    "capture_residual",
    "check_tokenizers",
    "extract_activations",
    "final_model",
    "find_model",
    "generate",
    "list_models",
    "load_model",
    "load_prompts",
    "load_reader",
    "load_texts",
    "load_tokenizer",
    "locate_layers",
    "make_grader",
    "measure_movement",
    "name_layers",
    "read_completions",
    "read_residual",
    "read_table",
    "rendered_examples",
    "resolve_device",
    "resolve_view",
    "sample_outcomes",
    "site_name",
    "token_mask",
    "usable_tokens",
]
_NAMES_OF: Final = {
    "rlgen_stats.schemas.dims": ("FORMAT_CLASSES",),
    "rlgen_stats.schemas.null_views": ("REPEAT_MODEL",),
    "rlgen_stats.stores.prompts": ("load_prompts", "load_texts"),
    "rlgen_stats.stores.study_models": ("ModelRef", "final_model", "find_model", "list_models", "resolve_view"),
    "rlgen_stats.stores.table_files": ("read_table",),
    ".activations": ("LayerStore", "extract_activations", "site_name", "token_mask"),
    ".checkpoints": ("load_model", "load_tokenizer", "resolve_device"),
    ".generation": ("Completion", "generate"),
    ".grading": ("Grade", "Grader", "make_grader"),
    ".movement": ("measure_movement",),
    ".outcomes": ("read_completions", "sample_outcomes"),
    ".rendering": ("PromptReader", "RenderedExample", "check_tokenizers", "load_reader", "rendered_examples"),
    ".residual_stream": ("block_output", "capture_residual", "locate_layers", "name_layers", "read_residual"),
    ".token_filter": ("usable_tokens",),
}

if not TYPE_CHECKING:  # a type checker would take every name for a known one
    __getattr__, __dir__ = lazy_names(__name__, _NAMES_OF)

"""MInference prefill in JAX: sparse attention for long prompts.

Every public name is imported from its module on first use: importing the package is instant and touches no device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minference_jax.attention import (
        a_shape_attention,
        block_sparse_attention,
        dense_attention,
        sparse_attention,
        vertical_slash_attention,
    )
    from minference_jax.compilation import use_compilation_cache
    from minference_jax.convert.checkpoint import convert_model, load_parameters
    from minference_jax.convert.export import export_model
    from minference_jax.evaluate import (
        Contender,
        Sample,
        evaluate_answers,
        evaluate_perplexity,
        infinitebench_samples,
        niah_samples,
        read_infinitebench,
        ruler_samples,
        summarize,
    )
    from minference_jax.generate import (
        CompiledProgram,
        LanguageModel,
        PrefillResult,
        compile_ahead,
        load_prefill,
        save_prefill,
    )
    from minference_jax.inspection import Inspection, inspect_attention
    from minference_jax.loading import load, load_shapes
    from minference_jax.patterns import (
        DEFAULT_PATTERN,
        AShape,
        BlockSparse,
        Dense,
        HeadPattern,
        ModelPatterns,
        PatternArrays,
        PatternKind,
        VerticalSlash,
        read_patterns,
        resolve_patterns,
        uniform_patterns,
        write_patterns,
    )
    from minference_jax.plan import MemoryPlan, plan_memory
    from minference_jax.search import SearchResult, calibration_prompts, search_patterns
    from minference_jax.tile_table import TileTable, read_tiles

    __version__: str

__all__ = [
    "DEFAULT_PATTERN",
    "AShape",
    "BlockSparse",
    "CompiledProgram",
    "Contender",
    "Dense",
    "HeadPattern",
    "Inspection",
    "LanguageModel",
    "MemoryPlan",
    "ModelPatterns",
    "PatternArrays",
    "PatternKind",
    "PrefillResult",
    "Sample",
    "SearchResult",
    "TileTable",
    "VerticalSlash",
    "__version__",
    "a_shape_attention",
    "block_sparse_attention",
    "calibration_prompts",
    "compile_ahead",
    "convert_model",
    "dense_attention",
    "evaluate_answers",
    "evaluate_perplexity",
    "export_model",
    "infinitebench_samples",
    "inspect_attention",
    "load",
    "load_parameters",
    "load_prefill",
    "load_shapes",
    "niah_samples",
    "plan_memory",
    "read_infinitebench",
    "read_patterns",
    "read_tiles",
    "resolve_patterns",
    "ruler_samples",
    "save_prefill",
    "search_patterns",
    "sparse_attention",
    "summarize",
    "uniform_patterns",
    "use_compilation_cache",
    "vertical_slash_attention",
    "write_patterns",
]

_MODULES = {
    "CompiledProgram": "generate",
    "Contender": "evaluate",
    "Inspection": "inspection",
    "LanguageModel": "generate",
    "MemoryPlan": "plan",
    "PrefillResult": "generate",
    "Sample": "evaluate",
    "SearchResult": "search",
    "TileTable": "tile_table",
    "a_shape_attention": "attention",
    "block_sparse_attention": "attention",
    "calibration_prompts": "search",
    "compile_ahead": "generate",
    "convert_model": "convert.checkpoint",
    "dense_attention": "attention",
    "evaluate_answers": "evaluate",
    "evaluate_perplexity": "evaluate",
    "export_model": "convert.export",
    "infinitebench_samples": "evaluate",
    "inspect_attention": "inspection",
    "load": "loading",
    "load_shapes": "loading",
    "load_parameters": "convert.checkpoint",
    "load_prefill": "generate",
    "niah_samples": "evaluate",
    "plan_memory": "plan",
    "read_infinitebench": "evaluate",
    "read_tiles": "tile_table",
    "ruler_samples": "evaluate",
    "save_prefill": "generate",
    "search_patterns": "search",
    "sparse_attention": "attention",
    "summarize": "evaluate",
    "use_compilation_cache": "compilation",
    "vertical_slash_attention": "attention",
}  # every other name is in patterns


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("minference-jax")
    if name not in __all__:
        raise AttributeError(f"module 'minference_jax' has no attribute {name!r}")
    return getattr(import_module(f"minference_jax.{_MODULES.get(name, 'patterns')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Compares what a search of the default model found with patterns of equal cost, on prompts that it did not see.

`--patterns` is what `minference-jax search --length N --budget X` wrote, with N and X as given here, so that its
prompts were the first two generated ones, key-value retrieval and a part of Python's manual. Unseen ones are the next
two, and the opening of a novel. Uniform patterns, of the default's proportions and of others, are made as large
as cost the budget of the search on the calibration prompts, as a mean over all heads.

A record's error: norm of the difference of a layer's attention output from dense, all heads together, over the norm of
dense attention's, mean over the layers. `--output FILE` keeps records.
"""

from __future__ import annotations

import argparse
import bisect
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import minference_jax
from minference_jax.analysis import (
    LayerActivations,
    head_densities,
    head_errors,
    read_layers,
    settings_for,
    sparse_outputs,
)
from minference_jax.bench.records import append, commit, record
from minference_jax.patterns import (
    DEFAULT_PATTERN,
    AShape,
    HeadPattern,
    ModelPatterns,
    PatternArrays,
    VerticalSlash,
    read_patterns,
    uniform_patterns,
)
from minference_jax.search.candidates import head_patterns, scaled

ROOT = Path(__file__).parent.parent
PROPORTIONS = {
    "uniform vertical-slash 500 : 700": DEFAULT_PATTERN,
    "uniform vertical-slash 30 : 2048": VerticalSlash(vertical_size=30, slash_size=2048),
    "uniform vertical-slash 500 : 1500": VerticalSlash(vertical_size=500, slash_size=1500),
    "uniform vertical-slash 3000 : 200": VerticalSlash(vertical_size=3000, slash_size=200),
    "uniform A-shape 1024 : 4096": AShape(sink_size=1024, window_size=4096),
}
SCALES = np.geomspace(1 / 32, 4, 8)


def prompts(model: minference_jax.LanguageModel, length: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Calibration prompts and unseen ones, by name, each of at most that many tokens."""
    retrieval, manual, other_retrieval, other_manual = minference_jax.calibration_prompts(model, length, count=4)
    unseen = {"retrieval": other_retrieval, "manual": other_manual, "novel": novel_prompt(model, length)}
    return {"retrieval": retrieval, "manual": manual}, unseen


def novel_prompt(model: minference_jax.LanguageModel, length: int) -> list[int]:
    """As many lines of the opening of a novel as fit, and a question about it."""
    lines = (ROOT / "examples" / "persuasion.txt").read_text("utf-8").splitlines()

    def encode(count: int) -> list[int]:
        return model.encode_chat("\n".join([*lines[:count], "", "Who is Sir Walter?"]))

    return encode(bisect.bisect_right(range(1, len(lines) + 1), length, key=lambda count: len(encode(count))))


def row(patterns: ModelPatterns, index: int) -> PatternArrays:
    """The patterns of one layer, int32 [N]."""
    return PatternArrays(*(x[index] for x in patterns.arrays()))


def uniform(model: minference_jax.LanguageModel, pattern: HeadPattern) -> ModelPatterns:
    """The pattern for every head."""
    return uniform_patterns(model.config.num_layers, model.config.num_heads, pattern)


def of_equal_cost(
    model: minference_jax.LanguageModel, calibration: list[list[int]], budget: float
) -> dict[str, ModelPatterns]:
    """Uniform patterns whose mean density on the prompts is the budget."""
    settings, num_heads, size = settings_for(model), model.config.num_heads, max(map(len, calibration))
    costs = {name: np.zeros(SCALES.size) for name in PROPORTIONS}
    for layers in read_layers(model, calibration):
        for layer in layers:
            for name, pattern in PROPORTIONS.items():
                for place, scale in enumerate(SCALES):
                    sizes = scaled(pattern, np.full(num_heads, scale), size)
                    costs[name][place] += np.mean(head_densities(layer, sizes, settings))
    reads, made = model.config.num_layers * len(calibration), {}
    for name, pattern in PROPORTIONS.items():
        scale = np.exp(np.interp(budget, costs[name] / reads, np.log(SCALES)))
        made[f"{name} at {budget:g}"] = uniform(
            model, head_patterns(pattern, scaled(pattern, np.array([scale]), size))[0]
        )
    return made


def errors(model: minference_jax.LanguageModel, prompt: list[int], compared: dict[str, ModelPatterns]) -> Iterator:
    """For each layer and name: squared errors and squared norms [N], and densities [N]."""
    settings = settings_for(model)
    for index, (layer,) in enumerate(read_layers(model, [prompt])):
        yield {name: _figures(layer, row(patterns, index), settings) for name, patterns in compared.items()}


def _figures(layer: LayerActivations, pattern: PatternArrays, settings) -> np.ndarray:
    out, _, density = sparse_outputs(layer, pattern, settings)
    return np.array([*head_errors(out, layer.out, layer.kv_len), density])


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--budget", type=float, default=0.3, help="share of dense (0.3)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--patterns", required=True)
    arguments = parser.parse_args()
    made_by = commit()  # of the code that runs, whatever happens to the tree meanwhile
    model = minference_jax.load()
    calibration, unseen = prompts(model, min(arguments.length, model.config.max_length))
    searched = f"searched at {arguments.budget:g}"
    compared = {searched: read_patterns(arguments.patterns), "default": uniform(model, DEFAULT_PATTERN)}
    compared |= of_equal_cost(model, list(calibration.values()), arguments.budget)
    for name, patterns in compared.items():
        print(f"{name}: {patterns.source}", flush=True)
    shape = {name: getattr(model.config, name) for name in ("num_heads", "num_kv_heads", "head_dim")}
    shape |= {"dtype": str(model.model.dtype), "batch": 1, "implementation": settings_for(model).implementation}
    for prompt_name, tokens in unseen.items():
        layers = list(errors(model, tokens, compared))
        for name, patterns in compared.items():
            wrong, whole, density = np.stack([layer[name] for layer in layers], axis=1)  # [L, N] each
            error = float(np.sqrt(wrong.sum(axis=1) / whole.sum(axis=1)).mean())
            by_head = np.sqrt(wrong / whole)
            print(
                f"{prompt_name:10} {name:36} density {density.mean():.3f}  error {error:.4f}; of heads: mean "
                f"{by_head.mean():.4f}, median {np.median(by_head):.4f}, 90% {np.quantile(by_head, 0.9):.4f}",
                flush=True,
            )
            if arguments.output is not None:
                one = record(
                    suite="search",
                    case=f"{name}, unseen {prompt_name}",
                    pattern=None if name == searched else str(patterns.layers[0][0]),
                    slash_granularity="line",
                    lists="activations",
                    length=len(tokens),
                    density=float(density.mean()),
                    error=error,
                    commit=made_by,
                    **shape,
                )
                append(arguments.output, one)


if __name__ == "__main__":
    main()

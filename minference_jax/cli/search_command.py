"""`minference-jax search`."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from minference_jax.cli.inputs import encode_prompt, load_model, model_name, read_text
from minference_jax.cli.progress import StepsDone, wants_bars
from minference_jax.generate import LanguageModel
from minference_jax.patterns import write_patterns
from minference_jax.patterns.heads import KINDS
from minference_jax.search import (
    DEFAULT_CANDIDATES,
    CandidateResult,
    LayerResult,
    SearchResult,
    choose,
    retrieval_prompt,
    search_patterns,
)


def run(arguments: argparse.Namespace) -> None:
    """Searches, prints a line for each layer, writes the file and says where it is.

    Raises:
        ValueError, NotImplementedError, MemoryError, OSError: as `search_patterns`; options that do not go together;
            the output exists.
    """
    output = Path(arguments.output)
    journal = output.with_name(f"{output.name}.journal")
    _check(arguments, output)
    texts = None if arguments.prompt_file is None else [read_text(name) for name in arguments.prompt_file]
    model = load_model(arguments)
    prompts = _prompts(model, arguments, texts)
    if arguments.overwrite and output.exists():  # where it does not, an interrupted search with --overwrite goes on
        journal.unlink(missing_ok=True)
        output.unlink()
    try:
        with StepsDone(wants_bars(arguments.progress)) as progress:
            found = search_patterns(
                model,
                prompts,
                budget=arguments.budget,
                levels=arguments.levels or (1.0,),
                cost=arguments.cost,
                candidates=arguments.candidates or DEFAULT_CANDIDATES,
                slash_granularity=arguments.slash_granularity,
                implementation=arguments.implementation,
                name=model_name(arguments),
                journal=journal,
                progress=progress,
                finished=lambda layer: print(line(layer, arguments.budget), flush=True),
            )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on behind the last finished layer", file=sys.stderr)
        raise
    write_patterns(found.patterns, output)
    if arguments.published is not None:
        write_patterns(found.patterns, arguments.published, format="published")
    print(summary(found, arguments.budget))
    print(f"written to {output}; what was compared is in {journal}")


def _check(arguments: argparse.Namespace, output: Path) -> None:
    if arguments.prompt_file is None:
        given = ("question", "max_prompt_tokens")
        foreign = [name for name in given if getattr(arguments, name) is not None]
        if foreign:
            raise ValueError(f"--{foreign[0].replace('_', '-')} goes with --prompt-file")
    else:
        foreign = [name for name in ("length", "num_prompts", "seed") if getattr(arguments, name) is not None]
        if foreign:
            raise ValueError(f"--{foreign[0].replace('_', '-')} is for generated prompts, not for --prompt-file")
    for path in (output, *([] if arguments.published is None else [Path(arguments.published)])):
        if path.exists() and not arguments.overwrite:
            raise ValueError(f"{path} exists: name another file, or give --overwrite")
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} is no folder, so {path.name} can't be written there")
    if arguments.published is not None and Path(arguments.published).resolve() == output.resolve():
        raise ValueError(f"--published {arguments.published} is the output itself: name another file")


def _prompts(model: LanguageModel, arguments: argparse.Namespace, texts: list[str] | None) -> list[list[int]]:
    if texts is None:
        seed, count = arguments.seed or 0, arguments.num_prompts or 1
        if model.tokenizer is None:
            raise ValueError(f"{model_name(arguments)} has no tokenizer files, so it can't read text")
        return [retrieval_prompt(model, arguments.length, seed=seed + index) for index in range(count)]
    prompts = []
    for name, text in zip(arguments.prompt_file, texts, strict=True):
        if not text.strip():
            raise ValueError(f"{name} is empty")
        prompts.append(encode_prompt(model, text, arguments).tokens)
    return prompts


def line(layer: LayerResult, budget: float) -> str:
    """What one layer's heads would get if it had the budget for itself."""
    (chosen,) = choose([layer], budget)
    return f"layer {layer.layer:3}: {_described([chosen])}"


def summary(found: SearchResult, budget: float) -> str:
    """How often each kind was chosen, and the mean error beside that of each candidate for all heads."""
    lines = [
        f"all layers: {_described(choose(found.layers, budget))}",
        "one candidate for all heads:",
    ]
    for place, one in enumerate(found.layers[0].candidates):
        same = [layer.candidates[place] for layer in found.layers]
        errors, costs = ([x for result in same for x in getattr(result, name)] for name in ("error", "cost"))
        sizes = " ".join(map(str, vars(one.candidate).values()))
        name = f"  {KINDS[type(one.candidate)].name.lower()} {sizes} at {one.budget:g}"
        if None in errors:
            lines.append(f"{name:36} over the budget at {errors.count(None)} heads")
        else:
            lines.append(f"{name:36} error {statistics.fmean(errors):.4f}, cost {statistics.fmean(costs):.3f}")
    return "\n".join(lines)


def _described(chosen: Sequence[Sequence[CandidateResult]]) -> str:
    """Mean error and cost of what was chosen, and how often each kind."""
    heads = [(one, head) for row in chosen for head, one in enumerate(row)]
    kinds = Counter(KINDS[type(one.candidate)].name.lower() for one, _ in heads)
    error, cost = (statistics.fmean(getattr(one, name)[head] for one, head in heads) for name in ("error", "cost"))
    counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    return f"error {error:.4f}, cost {cost:.3f}; {counted}"

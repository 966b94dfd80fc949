"""`minference-jax search`."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from minference_jax.analysis import activation_bytes
from minference_jax.cli.inputs import encode_prompt, load_model, model_name, read_text
from minference_jax.cli.outputs import check_output
from minference_jax.cli.progress import StepsDone, wants_bars
from minference_jax.generate import LanguageModel
from minference_jax.patterns import VerticalSlash, write_patterns
from minference_jax.patterns.heads import KINDS
from minference_jax.search import (
    DEFAULT_CANDIDATES,
    CandidateResult,
    LayerResult,
    SearchResult,
    calibration_prompts,
    choose,
    least_cost,
    search_patterns,
)
from minference_jax.search.candidates import check_candidates
from minference_jax.search.search import level_budgets

_POOR = 0.2
"""Mean error above which a budget is called too small: sparse heads then miss a fifth of their output's norm."""


def run(arguments: argparse.Namespace) -> None:
    """Searches, prints a line for each layer, writes the file and says where it is.

    Raises:
        ValueError, NotImplementedError, MemoryError, OSError: as `search_patterns`; options that do not go together;
            the output exists.
    """
    check_output(arguments.output, replaces=True)
    output = Path(arguments.output)
    journal = output.with_name(f"{output.name}.journal")
    _check_options(arguments)
    _check_files(arguments, output, journal)
    # The old answer and its journal stay until the new ones are there; what is unfinished stands beside them.
    begun = _part(journal) if output.exists() else journal
    texts = None if arguments.prompt_file is None else [read_text(name) for name in arguments.prompt_file]
    model = load_model(arguments)
    prompts = _prompts(model, arguments, texts)
    print(needs(model, prompts), flush=True)
    try:
        with StepsDone(wants_bars(arguments.progress)) as progress:
            found = search_patterns(
                model,
                prompts,
                budget=arguments.budget,
                levels=arguments.levels,
                dense_heads=arguments.dense_heads,
                cost=arguments.cost,
                candidates=arguments.candidates or DEFAULT_CANDIDATES,
                slash_granularity=arguments.slash_granularity or "line",
                implementation=arguments.implementation,
                name=model_name(arguments),
                journal=begun,
                progress=progress,
                finished=lambda layer: print(line(layer, arguments.budget), flush=True),
            )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on behind the last finished layer", file=sys.stderr)
        raise
    write_patterns(found.patterns, output)
    begun.replace(journal)
    if arguments.published is not None:
        write_patterns(found.patterns, arguments.published, format="published")
    print(summary(found))
    print(f"written to {output}; what was compared is in {journal}")


def _part(journal: Path) -> Path:
    """Where the journal of an unfinished search stands while the old answer has its own."""
    return journal.with_name(f"{journal.name}.part")


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses options that would be read by nothing, and what the search would refuse when the model is loaded."""
    if arguments.prompt_file is None:
        given = ("question", "max_prompt_tokens")
        foreign = [name for name in given if getattr(arguments, name) is not None]
        if foreign:
            raise ValueError(f"--{foreign[0].replace('_', '-')} goes with --prompt-file")
    else:
        foreign = [name for name in ("length", "num_prompts", "seed") if getattr(arguments, name) is not None]
        if foreign:
            raise ValueError(f"--{foreign[0].replace('_', '-')} is for generated prompts, not for --prompt-file")
    has_levels = arguments.levels is None or len(arguments.levels) > 1
    may_be_dense = has_levels if arguments.dense_heads is None else arguments.dense_heads
    if arguments.published is not None and may_be_dense:
        raise ValueError(
            "--published needs --no-dense-heads or --levels 1: the published format has no name for a dense head"
        )
    if arguments.published is not None and arguments.slash_granularity == "block":
        raise ValueError("--published does not go with --slash-granularity block: that format has no place for it")
    level_budgets(arguments.budget, arguments.levels)
    candidates = check_candidates(arguments.candidates or DEFAULT_CANDIDATES)
    slashes = [one for one in candidates if isinstance(one, VerticalSlash)]
    if arguments.slash_granularity is not None and not slashes:
        raise ValueError("--slash-granularity goes with vertical_slash, which is not among --candidates")


def _check_files(arguments: argparse.Namespace, output: Path, journal: Path) -> None:
    """Whether every file can be written at the end, and over nothing that is to stay, before hours of work."""
    if arguments.published is not None:
        check_output(arguments.published, replaces=True)
    published = [] if arguments.published is None else [Path(arguments.published)]
    for path in (output, *published):
        if path.exists() and not arguments.overwrite:
            raise ValueError(f"{path} exists: name another file, or give --overwrite")
    begun = _part(journal)
    read = [*(arguments.prompt_file or []), *([] if arguments.tiles is None else [arguments.tiles])]
    taken = [(output, "the output itself"), *((one, "the journal of the output") for one in (journal, begun))]
    for path in published:
        for other, what in taken:
            if path.resolve() == other.resolve():
                raise ValueError(f"--published {path} is {what}: name another file")
    written = {path.resolve() for path in (output, journal, begun, *published)}
    for name in read:
        if Path(name).resolve() in written:
            raise ValueError(f"{name} is read and would be written, too: name another output")


def _prompts(model: LanguageModel, arguments: argparse.Namespace, texts: list[str] | None) -> list[list[int]]:
    if texts is None:
        seed, count = arguments.seed or 0, arguments.num_prompts or 2
        if model.tokenizer is None:
            raise ValueError(f"{model_name(arguments)} has no tokenizer files, so it can't read text")
        chat = not arguments.no_chat_template
        return calibration_prompts(model, arguments.length, count=count, seed=seed, chat=chat)
    prompts = []
    for name, text in zip(arguments.prompt_file, texts, strict=True):
        if not text.strip():
            raise ValueError(f"{name} is empty")
        prompts.append(encode_prompt(model, text, arguments).tokens)
    return prompts


def line(layer: LayerResult, budget: float) -> str:
    """What one layer's heads would get if it had the budget for itself, or the least that it can cost above that."""
    (chosen,) = choose([layer], max(budget, least_cost([layer])))
    return f"layer {layer.layer:3}: {_described([chosen])}"


def needs(model: LanguageModel, prompts: list[list[int]]) -> str:
    """What the search reads, and the memory that it takes for as long as it runs."""
    lengths = [len(prompt) for prompt in prompts]
    read = f"{lengths[0]:,} tokens" if len(prompts) == 1 else f"{len(prompts)} prompts of up to {max(lengths):,} tokens"
    size = activation_bytes(model, lengths) / 1e6
    return f"reads {read}; activations take {size:,.1f} MB beside the weights and the attention of one prompt"


def summary(found: SearchResult) -> str:
    """How often each kind was chosen, the mean error beside that of each candidate for all heads, and warnings."""
    lines = [
        f"all layers: {_described(found.chosen)}",
        "one candidate for all heads:",
    ]
    for place, one in enumerate(found.layers[0].candidates):
        same = [layer.candidates[place] for layer in found.layers]
        errors, costs = ([x for result in same for x in getattr(result, name)] for name in ("error", "cost"))
        sizes = "".join(f" {size}" for size in vars(one.candidate).values())
        name = f"  {KINDS[type(one.candidate)].name.lower()}{sizes} at {one.budget:g}"
        if None in errors:
            lines.append(f"{name:36} over the budget at {errors.count(None)} heads")
        else:
            lines.append(f"{name:36} error {statistics.fmean(errors):.4f}, cost {statistics.fmean(costs):.3f}")
    return "\n".join([*lines, *_warnings(found)])


def _warnings(found: SearchResult) -> list[str]:
    """Which levels fitted no head, and whether what was chosen is far from dense attention."""
    fits: dict[float, bool] = {}
    for one in (one for layer in found.layers for one in layer.candidates):
        fits[one.budget] = fits.get(one.budget, False) or any(error is not None for error in one.error)
    lines = [f"no candidate keeps within {budget:g} at any head" for budget, some in fits.items() if not some]
    errors = [one.error[head] for row in found.chosen for head, one in enumerate(row)]
    if statistics.fmean(errors) > _POOR:  # type: ignore[arg-type]
        lines.append(
            f"the mean error is above {_POOR:g}: the budget is too small for these prompts; tiles of 64 by 64 tokens "
            "count whole, so that short prompts need a larger share: give a larger budget or longer prompts"
        )
    return lines


def _described(chosen: Sequence[Sequence[CandidateResult]]) -> str:
    """Mean error and cost of what was chosen, and how often each kind."""
    heads = [(one, head) for row in chosen for head, one in enumerate(row)]
    kinds = Counter(KINDS[type(one.candidate)].name.lower() for one, _ in heads)
    error, cost = (statistics.fmean(getattr(one, name)[head] for one, head in heads) for name in ("error", "cost"))
    counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    return f"error {error:.4f}, cost {cost:.3f}; {counted}"

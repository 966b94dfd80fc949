"""`minference-jax evaluate`: benchmarks of long prompts, dense attention against others, as a table or as JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minference_jax.bench.records import append, environment
from minference_jax.cli.inputs import load_model, model_name, read_text
from minference_jax.cli.progress import wants_bars
from minference_jax.cli.values import HEAD_PATTERNS, head_pattern
from minference_jax.evaluate import (
    NO_CORPUS,
    SYNTHETIC,
    Contender,
    Sample,
    evaluate_answers,
    evaluate_perplexity,
    infinitebench_samples,
    niah_samples,
    plot,
    read_infinitebench,
    ruler_samples,
    summarize,
    table,
)
from minference_jax.evaluate.contenders import with_dense
from minference_jax.evaluate.plots import check_plot
from minference_jax.evaluate.statistics import quantile
from minference_jax.generate import LanguageModel
from minference_jax.patterns import read_patterns

_SETTINGS = {  # what a sample depends on beside its task, length and number
    *("dtype", "seed", "no_chat_template", "text", "depths", "template"),
    *("squad", "hotpotqa", "data", "truncate_middle", "questions"),
}


def run(arguments: argparse.Namespace) -> None:
    """Asks, prints the table, and writes what the options name."""
    quantile(arguments.confidence)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    files = [Path(name).resolve() for name in (arguments.output, arguments.summary) if name is not None]
    if len(set(files)) < len(files):
        raise ValueError(f"--output and --summary are both {arguments.output}: name another file")
    contenders = with_dense(choose_contenders(arguments))
    text = None if getattr(arguments, "text", None) is None else read_text(arguments.text)
    model = load_model(arguments)
    settings = {"suite": arguments.suite, "model": model_name(arguments)}
    settings |= {name: getattr(arguments, name) for name in sorted(_SETTINGS) if hasattr(arguments, name)}
    with tqdm(desc=arguments.suite, unit="answer", file=sys.stderr, disable=not wants_bars(arguments.progress)) as bar:

        def told(record: Mapping[str, Any]) -> None:
            bar.set_postfix_str(f"{record['task']} {record['length']} {record['attention']}", refresh=False)
            bar.update()

        shared: dict[str, Any] = {"output": arguments.output, "settings": settings, "told": told}
        if arguments.suite == "perplexity":
            counts = {"excerpts": arguments.samples, "steps": arguments.steps}
            records = evaluate_perplexity(model, text or "", arguments.lengths, contenders, **counts, **shared)
        else:
            samples = choose_samples(arguments, model, text)
            shared["share_contexts"] = not arguments.whole_prompts
            records = evaluate_answers(model, samples, contenders, **shared)
    rows = summarize(records, arguments.confidence)
    print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if arguments.json else table(rows), flush=True)
    if arguments.summary is not None:
        facts, made = settings | {"dtype": str(model.model.dtype)}, environment()
        for row in rows:
            append(Path(arguments.summary), {**facts, **row, **made})
    if arguments.plot is not None:
        plot(
            records,
            arguments.plot,
            title=f"{model_name(arguments)}, {arguments.suite}",
            confidence=arguments.confidence,
        )


def choose_contenders(arguments: argparse.Namespace) -> list[Contender]:
    """What --attentions asks for; without it the model's own patterns and an A-shape of equal cost.

    Raises:
        ValueError: one that makes no sense.
        OSError: a pattern file can't be read.
    """
    found: list[Contender] = []
    for one in arguments.attentions or ["minference", "a_shape"]:
        name, equals, what = one.partition("=")
        name, what = (name, what) if equals else (Path(one).name, one)
        found.append(_contender(name, what, found, arguments))
    return found


def _contender(name: str, what: str, before: list[Contender], arguments: argparse.Namespace) -> Contender:
    options: dict[str, Any] = {"name": name, "implementation": arguments.implementation}
    granularity = {"slash_granularity": arguments.slash_granularity}
    kind = what.partition(":")[0]
    if what == "dense":
        return Contender(**options, attention="dense")
    if what == "minference":
        return Contender(**options, **granularity)
    if what == "a_shape":
        others = [one.name for one in before if one.attention not in ("a_shape", "dense")]
        if not others:
            raise ValueError("a_shape costs as much as a sparse attention named before it, or give a_shape:SINK,WINDOW")
        return Contender(**options, attention="a_shape", equal_cost_to=others[0])
    if kind in HEAD_PATTERNS:
        try:
            pattern = head_pattern(what)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None
        return Contender(**options, **granularity, attention=kind, pattern=pattern)
    return Contender(**options, **granularity, pattern=read_patterns(what))


def choose_samples(arguments: argparse.Namespace, model: LanguageModel, text: str | None) -> Iterator[Sample]:
    """The samples that the options ask for."""
    chat = False if arguments.no_chat_template else None
    same: dict[str, Any] = {"seed": arguments.seed, "chat": chat}
    if arguments.suite == "niah":
        same |= {"depths": arguments.depths, "rounds": arguments.samples}
        if arguments.template is not None:
            same["template"] = read_text(arguments.template)
        return niah_samples(model, text or "", arguments.lengths, **same)
    same["samples"] = arguments.samples
    if arguments.suite == "ruler":
        files = {"squad": arguments.squad, "hotpotqa": arguments.hotpotqa}
        return ruler_samples(model, arguments.tasks or NO_CORPUS, arguments.lengths, essays=text, **files, **same)
    tasks = arguments.tasks or list(SYNTHETIC)
    if arguments.data is None:
        if arguments.truncate_middle:
            raise ValueError("--truncate-middle goes with --data: samples made anew fit their length")
        return infinitebench_samples(model, tasks, arguments.lengths, questions=arguments.questions, **same)
    if arguments.questions > 1:
        raise ValueError("--questions does not go with --data: the files have their questions")
    return itertools.chain.from_iterable(
        read_infinitebench(
            model,
            Path(arguments.data) / f"{task}.jsonl",
            task,
            length=length,
            samples=arguments.samples,
            truncate_middle=arguments.truncate_middle,
            chat=chat,
        )
        for task, length in itertools.product(tasks, arguments.lengths)
    )

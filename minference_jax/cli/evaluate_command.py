"""`minference-jax evaluate`: benchmarks of long prompts, dense attention against others, as a table or as JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minference_jax.bench.records import append
from minference_jax.cli.evaluate_contenders import Choice, choose_contenders, with_patterns
from minference_jax.cli.inputs import load_model, model_name, read_text
from minference_jax.cli.outputs import check_output
from minference_jax.cli.progress import wants_bars
from minference_jax.evaluate import (
    INFINITEBENCH_TASKS,
    NO_CORPUS,
    SYNTHETIC,
    Contender,
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
from minference_jax.evaluate.ruler import ESSAY, QA
from minference_jax.evaluate.samples import Samples, check_lengths, check_names
from minference_jax.evaluate.statistics import quantile
from minference_jax.figures import check_picture
from minference_jax.generate import LanguageModel
from minference_jax.models import linear_of
from minference_jax.patterns import ModelPatterns

_SEED = 42  # where none is given

_SETTINGS = {  # what a sample depends on beside its task, length and number
    *("dtype", "seed", "no_chat_template", "text", "depths", "template"),
    *("squad", "hotpotqa", "data", "truncate_middle", "questions"),
}


def run(arguments: argparse.Namespace) -> None:
    """Asks, prints the table, and writes what the options name."""
    quantile(arguments.confidence)
    check_options(arguments)
    choices = choose_contenders(arguments)
    _check_paths(arguments, choices)
    text = None if getattr(arguments, "text", None) is None else read_text(arguments.text)
    model = load_model(arguments)
    contenders = with_patterns(choices, arguments.model, model)
    _say_foreign(contenders, arguments, model)
    settings = {"suite": arguments.suite, "model": model_name(arguments)}
    settings |= {name: getattr(arguments, name) for name in sorted(_SETTINGS) if hasattr(arguments, name)}
    records = _records(arguments, model, contenders, text, settings)
    rows = summarize(records, arguments.confidence)
    print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if arguments.json else table(rows), flush=True)
    if arguments.summary is not None:
        facts = settings | {"dtype": str(model.model.dtype), "linear": linear_of(model.model)}
        for row in rows:
            append(Path(arguments.summary), {**facts, **row})
    if arguments.plot is not None:
        plot(
            records,
            arguments.plot,
            title=f"{model_name(arguments)}, {arguments.suite}",
            confidence=arguments.confidence,
        )


def _say_foreign(contenders: Sequence[Contender], arguments: argparse.Namespace, model: LanguageModel) -> None:
    """Says on standard error which contenders have patterns that are for another model."""
    for one in contenders:
        patterns = one.check(model)
        if isinstance(patterns, ModelPatterns):
            said = patterns.described_for(model_name(arguments))
            if said != patterns.source:
                print(f"{one.name}: {said}", file=sys.stderr)


def _records(
    arguments: argparse.Namespace,
    model: LanguageModel,
    contenders: Sequence[Contender],
    text: str | None,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """What the benchmark finds, with a bar over all answers."""
    samples: Samples | None = None
    count = len(arguments.lengths) * arguments.samples
    if arguments.suite != "perplexity":
        samples = choose_samples(arguments, model, text)
        count = len(samples)
    shown = wants_bars(arguments.progress)
    bar = tqdm(desc=arguments.suite, total=count * len(contenders), unit="answer", file=sys.stderr, disable=not shown)
    with bar:

        def on_record(record: Mapping[str, Any]) -> None:
            bar.set_postfix_str(f"{record['task']} {record['length']} {record['attention']}", refresh=False)
            bar.update()

        shared: dict[str, Any] = {"output": arguments.output, "settings": settings, "on_record": on_record}
        if samples is None:
            counts = {"excerpts": arguments.samples, "steps": arguments.steps}
            return evaluate_perplexity(model, text or "", arguments.lengths, contenders, **counts, **shared)
        shared["share_contexts"] = not getattr(arguments, "whole_prompts", False)
        return evaluate_answers(model, samples, contenders, **shared)


def check_options(arguments: argparse.Namespace) -> None:
    """Refuses options that would do nothing, and sets the seed where there is one.

    Raises:
        ValueError: an option that does not go with the others.
    """
    if arguments.plot is not None:
        check_picture(arguments.plot)
    if arguments.suite == "infinitebench":
        from_files = arguments.data is not None
        if arguments.truncate_middle and not from_files:
            raise ValueError("--truncate-middle goes with --data: samples made anew fit their length")
        if arguments.questions > 1 and from_files:
            raise ValueError("--questions does not go with --data: the files have their questions")
        if arguments.seed is not None and from_files:
            raise ValueError("--seed does not go with --data: nothing is drawn")
        if arguments.whole_prompts and arguments.questions == 1 and not from_files:
            raise ValueError("--whole-prompts goes with --questions or --data: else no two questions share a context")
        if from_files:
            return
        for task in arguments.tasks or ():
            if task in INFINITEBENCH_TASKS and task not in SYNTHETIC:
                raise ValueError(f"{task} is not made anew: give --data FOLDER, in which {task}.jsonl is")
    if arguments.suite == "ruler":
        tasks = arguments.tasks or NO_CORPUS
        for option, users in (("text", ESSAY), ("squad", QA[:1]), ("hotpotqa", QA[1:])):
            asked = [task for task in tasks if task in users]
            if getattr(arguments, option) is not None and not asked:
                raise ValueError(f"--{option} is for {', '.join(users)}, none of which is among --tasks")
            if getattr(arguments, option) is None and asked:
                raise ValueError(f"{asked[0]} is made from a file that you have: give --{option} FILE")
    if hasattr(arguments, "seed") and arguments.seed is None:
        arguments.seed = _SEED


def _check_paths(arguments: argparse.Namespace, choices: Sequence[Choice]) -> None:
    """Refuses outputs that are one file, are also read, or can't be written."""
    outputs = {f"--{name}": getattr(arguments, name) for name in ("output", "summary", "plot")}
    inputs = {
        f"--{name}": getattr(arguments, name, None) for name in ("text", "template", "squad", "hotpotqa", "tiles")
    }
    inputs |= {f"--attentions {one.contender.name}": one.source for one in choices}
    if getattr(arguments, "data", None) is not None:
        tasks = arguments.tasks or SYNTHETIC
        inputs |= {f"--data {task}": str(Path(arguments.data) / f"{task}.jsonl") for task in tasks}
    given = {name: Path(path).resolve() for name, path in outputs.items() if path is not None}
    read = {name: Path(path).resolve() for name, path in inputs.items() if path not in (None, "-")}
    for place, (name, path) in enumerate(given.items()):
        try:
            check_output(outputs[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for other, same in [*list(given.items())[:place], *read.items()]:
            if path == same:
                raise ValueError(f"{other} and {name} are both {outputs[name]}: name another file")


def choose_samples(arguments: argparse.Namespace, model: LanguageModel, text: str | None) -> Samples:
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
    check_names("task", tasks, tuple(SYNTHETIC) if arguments.data is None else INFINITEBENCH_TASKS)
    check_lengths(model, arguments.lengths)
    if arguments.data is None:
        return infinitebench_samples(model, tasks, arguments.lengths, questions=arguments.questions, **same)
    found = [
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
    ]
    return Samples([(one,) for one in found], iter, sum(map(len, found)))

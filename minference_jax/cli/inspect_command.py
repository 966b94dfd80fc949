"""`minference-jax inspect`: what each head keeps of a prompt, as tables or as JSON, and as pictures."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from minference_jax.cli.inputs import choose_attention, encode_prompt, load_model, model_name, read_prompt
from minference_jax.cli.outputs import check_output
from minference_jax.cli.patterns_command import describe
from minference_jax.cli.progress import StepsDone, wants_bars
from minference_jax.cli.values import layer_and_head
from minference_jax.figures import check_picture
from minference_jax.generate import LanguageModel
from minference_jax.generate.streaming import decode_text
from minference_jax.inspection import Inspection, Passage, inspect_attention
from minference_jax.inspection.pictures import draw_head, draw_heat_maps
from minference_jax.measure import Prompt, device_name

_EXCERPT = 72  # characters of a passage in a table


def run(arguments: argparse.Namespace) -> None:
    """Inspects, prints and draws.

    Raises:
        ValueError, NotImplementedError, MemoryError, OSError: as `inspect_attention` and its pictures.
    """
    attention, text = choose_attention(arguments), read_prompt(arguments)
    maps = [(_head(place), path) for place, path in arguments.head_map]
    _check_pictures([path for _, path in maps] + ([] if arguments.heat_maps is None else [arguments.heat_maps]))
    model = load_model(arguments)
    prompt = encode_prompt(model, text, arguments)
    _check_place(model, arguments.of or ())
    with StepsDone(wants_bars(arguments.progress)) as progress:
        found = inspect_attention(
            model,
            prompt.tokens,
            pattern=attention.pattern,
            slash_granularity=attention.slash_granularity,
            implementation=arguments.implementation,
            passage_size=arguments.passage_size,
            maps=[place for place, _ in maps],
            measure_time=not arguments.no_time,
            progress=progress,
        )
    if arguments.heat_maps is not None:
        draw_heat_maps(found, arguments.heat_maps)
    for place, path in maps:
        draw_head(found, *place, path)
    facts = record(model_name(arguments), model, prompt, found, attention.slash_granularity, arguments)
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else report(facts, every_head=arguments.heads))


def _check_pictures(paths: list[str]) -> None:
    """Whether every picture can be written, and none over another, before minutes of computing."""
    for index, path in enumerate(paths):
        if Path(path).resolve() in [Path(other).resolve() for other in paths[:index]]:
            raise ValueError(f"{path} is named for two pictures: name another file")
        check_picture(path)
        check_output(path)


def _head(text: str) -> tuple[int, int]:
    try:
        layer, head = layer_and_head(text)
    except (argparse.ArgumentTypeError, ValueError):
        raise ValueError(f"--head-map needs LAYER,HEAD and FILE, counted from 0, not {text!r}") from None
    return layer, head


def _check_place(model: LanguageModel, place: tuple[int, ...]) -> None:
    """Whether --of names something, before minutes of computing."""
    counts = (model.config.num_layers, model.config.num_heads)
    for name, index, count in zip(("layer", "head"), place, counts, strict=False):
        if index >= count:
            raise ValueError(f"--of: {name} {index} is not one of 0 to {count - 1}")


def record(
    name: str,
    model: LanguageModel,
    prompt: Prompt,
    found: Inspection,
    slash_granularity: str,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """All that an inspection found, as one JSON object; times in milliseconds, null where none was measured."""
    of = arguments.of or ()
    passages = found.passages.left_out(*of, count=arguments.passages)
    layers, heads = found.mass.shape
    rows = [
        {
            "layer": layer,
            "head": head,
            "pattern": describe(found.patterns.layers[layer][head]),
            "mass": float(found.mass[layer, head]),
            "error": float(found.error[layer, head]),
            "density": float(found.density[layer, head]),
            "expected_ms": None if found.head_ms is None else float(found.head_ms[layer, head]),
        }
        for layer in range(layers)
        for head in range(heads)
    ]
    return {
        "model": name,
        "dtype": str(model.model.dtype),
        "tokens": len(prompt.tokens),
        "chat_template": prompt.is_chat,
        "pattern": found.patterns.described_for(name),
        "slash_granularity": slash_granularity,
        "device": device_name(),
        "mass": float(found.mass.mean()),
        "error": float(found.error.mean()),
        "density": float(found.density.mean()),
        "heads": rows,
        "layer_sparse_ms": None if found.sparse_ms is None else found.sparse_ms.tolist(),
        "layer_dense_ms": None if found.dense_ms is None else found.dense_ms.tolist(),
        "passages_of": dict(zip(("layer", "head"), of, strict=False)),
        "passages_heads": heads * layers if not of else heads if len(of) == 1 else 1,
        "passages": [one._asdict() | {"text": _text(model, prompt, one)} for one in passages],
    }


def _text(model: LanguageModel, prompt: Prompt, passage: Passage) -> str:
    return decode_text(model.tokenizer, prompt.tokens[passage.start : passage.end])


def report(facts: dict[str, Any], *, every_head: bool) -> str:
    """The record as a page to read."""
    lines = [
        f"model        {facts['model']}, {facts['dtype']}",
        f"device       {facts['device']}",
        f"prompt       {facts['tokens']} tokens, {'in the chat template' if facts['chat_template'] else 'plain text'}",
        f"pattern      {facts['pattern']}",
        f"mean         mass kept {facts['mass']:.3f}, error {facts['error']:.3f}, density {facts['density']:.3f}",
        "",
        *(_head_table(facts["heads"]) if every_head else _layer_table(facts)),
        "",
        *_passage_table(facts),
    ]
    return "\n".join(lines)


def _layer_table(facts: dict[str, Any]) -> list[str]:
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for row in facts["heads"]:
        by_layer.setdefault(row["layer"], []).append(row)
    cells: list[tuple[str, ...]] = [
        ("layer", "mass kept", "least", "error", "largest", "of head", "density", "sparse, ms", "dense, ms")
    ]
    for layer, rows in by_layer.items():
        worst = max(rows, key=lambda row: row["error"])
        columns = {name: np.array([row[name] for row in rows]) for name in ("mass", "error", "density")}
        times = [facts[name] and facts[name][layer] for name in ("layer_sparse_ms", "layer_dense_ms")]
        means = {name: f"{values.mean():.3f}" for name, values in columns.items()}
        least, largest = f"{columns['mass'].min():.3f}", f"{worst['error']:.3f}"
        row = (means["mass"], least, means["error"], largest, str(worst["head"]), means["density"])
        cells.append((str(layer), *row, *map(_milliseconds, times)))
    return _aligned(cells)


def _head_table(rows: list[dict[str, Any]]) -> list[str]:
    cells: list[tuple[str, ...]] = [("layer", "head", "mass kept", "error", "density", "expected, ms", "pattern")]
    for row in rows:
        figures = (f"{row[name]:.3f}" for name in ("mass", "error", "density"))
        cells.append((str(row["layer"]), str(row["head"]), *figures, _milliseconds(row["expected_ms"]), row["pattern"]))
    return _aligned(cells, left=("pattern",))


def _passage_table(facts: dict[str, Any]) -> list[str]:
    place = facts["passages_of"]
    who = ", ".join(f"{name} {index}" for name, index in place.items()) or "the whole model"
    if not facts["passages"]:
        return [f"{who} leaves nothing out for the last queries"]
    cells: list[tuple[str, ...]] = [("tokens", "lost", "of mass", "kept", "read by heads", "text")]
    for one in facts["passages"]:
        text = textwrap.shorten(one["text"], _EXCERPT, placeholder=" ...")
        readers = f"{one['heads_reading']} of {facts['passages_heads']}"
        figures = (f"{one[name]:.4f}" for name in ("lost", "mass"))
        cells.append((f"{one['start']}-{one['end'] - 1}", *figures, f"{one['kept']:.3f}", readers, text))
    title = f"passages that {who} leaves out for the last queries, by the attention that is lost"
    return [title, *_aligned(cells, left=("text",))]


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _aligned(cells: list[tuple[str, ...]], left: tuple[str, ...] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(cells[0], row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]

"""Pictures of results: heat maps of needles, scores by length with intervals, perplexity by position."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minference_jax.evaluate.journal import PERPLEXITY
from minference_jax.evaluate.summary import summarize
from minference_jax.figures import check_picture, figure_class


def plot(
    records: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "", confidence: float = 0.95
) -> None:
    """Draws what an evaluation found: heat maps where samples have depths, else scores by length or perplexity.

    Args:
        records: of `evaluate_answers` or of `evaluate_perplexity`, at least one.
        path: of the picture; its ending says the kind: png, svg, pdf.
        title: above it.
        confidence: of the intervals.

    Raises:
        ValueError: no record; matplotlib is not installed, or does not know the file's ending.
        OSError: the file can't be written.
    """
    check_picture(path)
    if not records:
        raise ValueError("there is no record to plot")
    if records[0]["task"] == PERPLEXITY:
        figure = _perplexity(summarize(records, confidence))
    elif "depth" in records[0]["about"]:
        figure = _heat_maps(records)
    else:
        figure = _scores(summarize(records, confidence))
    figure.suptitle(title, fontsize="small", x=0.02, ha="left")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["attention"] for row in rows))


def _heat_maps(records: Sequence[Mapping[str, Any]]) -> Any:
    """One map of depth by length for each attention, 0 red to 1 green."""
    names = _names(records)
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["about"]["depth"] for record in records})
    figure = figure_class()(figsize=(1.5 + (1.2 + 0.7 * len(lengths)) * len(names), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(all_axes, names, strict=True):
        own = [record for record in records if record["attention"] == name]
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                cell = [r["score"] for r in own if (r["length"], r["about"]["depth"]) == (length, depth)]
                grid[row, column] = np.mean(cell) if cell else np.nan
        image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        density = np.mean([record["density"] for record in own])
        axes.set_title(f"{name}\nmean {np.nanmean(grid):.2f}, density {density:.2f}", fontsize="small")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, fontsize="x-small")
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize="x-small")
        axes.set_xlabel("tokens", fontsize="small")
    all_axes[0].set_ylabel("depth of the needle", fontsize="small")
    figure.colorbar(image, ax=list(all_axes), label="found")
    return figure


def _scores(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Scores by length for each task, one line with intervals for each attention."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(len(tasks), 4)
    figure = figure_class()(figsize=(3.2 * columns + 0.5, 2.8 * -(-len(tasks) // columns) + 0.6), layout="constrained")
    grid = figure.subplots(-(-len(tasks) // columns), columns, squeeze=False).ravel()
    for axes, task in zip(grid, tasks, strict=False):
        for shift, name in enumerate(_names(rows)):
            own = sorted((r for r in rows if (r["task"], r["attention"]) == (task, name)), key=lambda r: r["length"])
            values = np.array([(row["value"], row["low"], row["high"]) for row in own]).reshape(-1, 3).T
            reach = np.maximum([values[0] - values[1], values[2] - values[0]], 0)
            places = [row["length"] * (1 + 0.03 * shift) for row in own]  # beside one another
            axes.errorbar(places, values[0], yerr=reach, fmt="o-", capsize=3, label=name)
        lengths = sorted({row["length"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize="x-small")
        axes.set_ylim(-0.05, 1.05)
        axes.set_title(task, fontsize="small")
        axes.grid(alpha=0.3)
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    grid[0].legend(fontsize="x-small")
    figure.supxlabel("tokens", fontsize="small")
    figure.supylabel("score", fontsize="small")
    return figure


def _perplexity(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Perplexity by position for each length, and below it how far each is above dense attention."""
    lengths = sorted({row["length"] for row in rows})
    figure = figure_class()(figsize=(4.2 * len(lengths) + 0.5, 5.5), layout="constrained")
    grid = figure.subplots(2, len(lengths), squeeze=False, sharex="col")
    for column, length in enumerate(lengths):
        for name in _names(rows):
            own = [row for row in rows if (row["length"], row["attention"]) == (length, name) and row["positions"]]
            places = [sum(row["positions"]) / 2 for row in own]
            for axes, keys in zip(grid[:, column], (("value", "low", "high"), _DIFFERENCE), strict=True):
                if own[0][keys[0]] is not None:
                    middle, low, high = ([row[key] for row in own] for key in keys)
                    (line,) = axes.plot(places, middle, "o-", label=name, color=None if name != "dense" else "black")
                    axes.fill_between(places, low, high, alpha=0.15, color=line.get_color())
        grid[0, column].set_title(f"{length:,} tokens", fontsize="small")
        for axes in grid[:, column]:
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("perplexity")
    grid[1, 0].set_ylabel("above dense, nats a token")
    grid[0, 0].legend(fontsize="x-small")
    figure.supxlabel("position of the token", fontsize="small")
    return figure


_DIFFERENCE = ("difference", "difference_low", "difference_high")

"""Draws the records in benchmarks/results: times, speed-up, rates and shares by length. Needs the extra `plots`."""

import argparse
import re
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from minference_jax.bench.prefill_table import label, prefill_groups, variant
from minference_jax.bench.records import groups, read

FOLDER = Path(__file__).parent
LINES = {  # file -> (unit, of the cases, of dense attention, logarithmic)
    "time": ("ms", lambda row: row["ms"], lambda row: row["baseline_ms"], True),
    "speedup": ("dense : sparse", lambda row: row["baseline_ms"] / row["ms"], None, True),
    "rate": ("TFLOP/s on kept tiles", lambda row: row["tflops_kept"], lambda row: row["tflops_baseline"], False),
}


def series(group):
    """Rows of each case: {name: rows, the shortest first}."""
    found = {}
    for row in group:
        name = row["case"] + ", estimated lists" * (row["lists"] == "activations")
        found.setdefault(f"{name} ({row['implementation']}{', ' + row['tiles'] if row['tiles'] else ''})", []).append(
            row
        )
    return found


def draw_lines(group, unit, of_case, of_dense, logarithmic):
    """A figure with one line for each case, and one for the dense attention of each shape."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    for name, rows in series(group).items():
        axes.plot([row["length"] for row in rows], [of_case(row) for row in rows], "o-", label=name)
    shapes = {}
    for row in group if of_dense else ():
        if of_dense(row) is not None:
            shape = (row["num_heads"], row["num_kv_heads"], row["head_dim"])
            shapes.setdefault(shape, {})[row["length"]] = of_dense(row)
    for shape, points in shapes.items():
        name = "dense, {} heads / {} KV, head_dim {}".format(*shape)
        axes.plot(sorted(points), [points[length] for length in sorted(points)], "x--", label=name)
    axes.set_xscale("log", base=2)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    return figure


def draw_shares(group):
    """A figure with stacked shares of estimate, layout and kernel in each case's time, or None where none is known."""
    found = {name: [row for row in rows if row["index_ms"]] for name, rows in series(group).items()}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return None
    figure = Figure(figsize=(9, 2.5 * len(found)), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True):
        estimates = [row["estimate_ms"] or 0 for row in rows]
        parts = {
            "attention mass": estimates,
            "rest of the index": [max(row["index_ms"] - ms, 0) for row, ms in zip(rows, estimates, strict=True)],
            "kernel": [row["kernel_ms"] for row in rows],
        }
        bottom = [0.0] * len(rows)
        for part, values in parts.items():
            shares = [value / row["ms"] for value, row in zip(values, rows, strict=True)]
            axes.bar([f"{row['length']:,}" for row in rows], shares, bottom=bottom, label=part)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        axes.set_title(name, fontsize="small")
        axes.set_ylabel("share of time")
    axes.set_xlabel("tokens")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize="x-small")
    return figure


def draw_prefill_times(group):
    """A figure with seconds of whole prefills by length: dense, sparse, and without attention; None for one length."""
    if len({pair.any["length"] for pair in group}) == 1:
        return None
    lines = {}
    for pair in group:
        for name, row, field in (
            ("dense", pair.dense, "ms"),
            (label(pair.any), pair.sparse, "ms"),
            ("without attention", pair.any, "linear_ms"),
        ):
            if row is not None and row[field] is not None:
                lines.setdefault(name + variant(row), {})[row["length"]] = row[field] / 1e3
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        style = "x--" if name.startswith(("dense", "without attention")) else "o-"
        axes.plot(sorted(points), [points[length] for length in sorted(points)], style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    return figure


def draw_prefill_parts(group):
    """A figure with the parts of dense and sparse prefills, each timed alone, or None where none are known."""
    rows = [row for pair in group for row in pair if row is not None and row["kernel_ms"] and row["linear_ms"]]
    if not rows:
        return None
    figure = Figure(figsize=(max(6, 1.5 + len(rows)), 5.5), layout="constrained")
    axes = figure.add_subplot()
    places, bottom = range(len(rows)), [0.0] * len(rows)
    names = {"without attention": "linear_ms", "estimate and layout": "index_ms", "attention": "kernel_ms"}
    for name, field in names.items():
        values = [(row[field] or 0.0) / row["ms"] for row in rows]
        axes.bar(places, values, bottom=bottom, label=name)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.axhline(1, color="black", linewidth=0.8, label="the whole prefill")
    names = [f"{row['length']:,}\n{'dense' if row['attention'] == 'dense' else 'sparse'}{variant(row)}" for row in rows]
    axes.set_xticks(list(places), names, fontsize="x-small")
    axes.set_ylabel("part, timed alone : whole prefill")
    figure.legend(loc="outside lower center", ncols=4, fontsize="x-small")
    return figure


def draw_prefills(records, folder, suffix="png"):
    """Writes the figures of the prefill suite for each model and device, and gives their paths."""
    paths = []
    for group in prefill_groups(records):
        row = group[0].any
        folder.mkdir(parents=True, exist_ok=True)
        chunks = f"chunks {row['chunk_size']}" if row["chunk_size"] else ""
        layers = f"{row['layers']} of {row['model_layers']} layers"
        name = f"{row['device']} {row['case']} {row['dtype']} {row['layers']} {chunks}"
        place = re.sub(r"\W+", "_", name).strip("_")
        for kind, figure in {"times": draw_prefill_times(group), "parts": draw_prefill_parts(group)}.items():
            if figure is not None:
                title = f"{row['case']}, {layers}, {row['dtype']}, {row['device']}"
                figure.suptitle(title, fontsize="small", x=0.02, ha="left")
                paths.append(folder / f"{place}_prefill_{kind}.{suffix}")
                figure.savefig(paths[-1], dpi=150)
    return paths


def draw(records, folder, suffix="png"):
    """Writes the figures of each device and commit into the folder and gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for group in groups(records):
        row = group[0]
        figures = {name: draw_lines(group, *line) for name, line in LINES.items()}
        figures["shares"] = draw_shares(group)
        for name, figure in figures.items():
            if figure is not None:
                figure.suptitle(
                    f"{row['device']}, commit {row['commit']}, {row['dtype']}", fontsize="small", x=0.02, ha="left"
                )
                place = re.sub(r"\W+", "_", f"{row['device']} {row['commit']}").strip("_")
                paths.append(folder / f"{place}_{name}.{suffix}")
                figure.savefig(paths[-1], dpi=150)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER / "results" / "attention.jsonl")
    parser.add_argument("--prefills", type=Path, default=FOLDER / "results" / "prefill.jsonl")
    parser.add_argument("--folder", type=Path, default=FOLDER / "plots")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    arguments = parser.parse_args()
    paths = draw(read(arguments.results), arguments.folder, arguments.format)
    if arguments.prefills.exists():
        paths += draw_prefills(read(arguments.prefills), arguments.folder, arguments.format)
    for path in paths:
        print(path)

"""Draws the records in benchmarks/results: times, speed-up, rates and shares by length. Needs the extra `plots`."""

import argparse
import re
from pathlib import Path

from matplotlib.figure import Figure

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
    for name, rows in series(group).items():
        axes.plot([row["length"] for row in rows], [of_case(row) for row in rows], "o-", label=name)
    shapes = {}
    for row in group if of_dense else ():
        if of_dense(row) is not None:
            shape = (row["num_heads"], row["num_kv_heads"], row["head_dim"])
            shapes.setdefault(shape, {})[row["length"]] = of_dense(row)
    for shape, points in shapes.items():
        label = "dense, {} heads / {} KV, head_dim {}".format(*shape)
        axes.plot(sorted(points), [points[length] for length in sorted(points)], "x--", label=label)
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
    parser.add_argument("--folder", type=Path, default=FOLDER / "plots")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    arguments = parser.parse_args()
    for path in draw(read(arguments.results), arguments.folder, arguments.format):
        print(path)

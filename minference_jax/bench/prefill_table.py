"""Tables of the prefill suite: dense and sparse prefills of one run side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from minference_jax.bench.records import milliseconds

_MODEL = ("device", "commit", "case", "dtype", "linear", "layers", "chunk_size", "kv_cache")  # of one table
_MEASURED = (
    *("device", "case", "dtype", "linear", "layers", "chunk_size", "kv_cache", "attention", "pattern"),
    *("slash_granularity", "lists", "length"),
)


class Pair(NamedTuple):
    """A sparse prefill and the dense one that it took turns with; None where one of the two did not fit."""

    dense: dict[str, Any] | None
    sparse: dict[str, Any] | None

    @property
    def any(self) -> dict[str, Any]:
        """Either of them, for what they share."""
        return self.sparse or self.dense or {}


def prefill_groups(records: Iterable[dict[str, Any]]) -> list[list[Pair]]:
    """Records of the prefill suite in pairs, by model, device and commit; each group by attention and length.

    What was measured again on a device is there once, as it was measured last.
    """
    newest = {tuple(one[name] for name in _MEASURED): one for one in records if one["suite"] == "prefill"}
    every = [one for one in records if one["suite"] == "prefill"]
    pairs = [Pair(_run_of(one, every), one) for one in newest.values() if one["attention"] != "dense"]
    told = [id(pair.dense) for pair in pairs]
    lone = [one for one in newest.values() if one["attention"] == "dense" and id(one) not in told]
    shown = {(*_place(pair.any), pair.any["length"]) for pair in pairs}
    pairs += [Pair(one, None) for one in lone if (*_place(one), one["length"]) not in shown]
    groups: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_place(pair.any), []).append(pair)
    return [sorted(group, key=lambda pair: (label(pair.any), pair.any["length"])) for group in groups.values()]


def _place(one: dict[str, Any]) -> tuple:
    return tuple(one[name] for name in _MODEL)


def _run_of(sparse: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The dense prefill that a sparse one took turns with: its time is the sparse one's baseline."""
    for one in reversed(records):
        same = (*_place(one), one["length"]) == (*_place(sparse), sparse["length"])
        if same and one["attention"] == "dense" and one["ms"] == sparse["baseline_ms"]:
            return one
    return None


def label(one: dict[str, Any]) -> str:
    """What the heads of a sparse prefill keep, in a table; of a dense one nothing."""
    if one["attention"] == "dense":
        return ""
    blocks = ", block diagonals" if one["slash_granularity"] == "block" else ""
    auto = "auto: " if one["attention"] == "auto" else ""
    return f"{auto}{one['pattern']}{blocks}"


def prefill_table(records: Iterable[dict[str, Any]]) -> str:
    """Markdown: for each model, device and commit a table of whole prefills, and below it where and with what.

    Columns that no row has are left out. Without records of the suite the text is empty.
    """
    groups = prefill_groups(list(records))
    return "\n\n".join("\n".join((*_rows(group), "", _caption(group))) for group in groups)


def _rows(group: Sequence[Pair]) -> list[str]:
    labels = [label(pair.any) for pair in group]
    columns = {
        "tokens": [f"{pair.any['length']:,}" for pair in group],
        "sparse heads": labels if len(set(labels)) > 1 else [],
        "dense, s": [_seconds(pair.dense, "ms") for pair in group],
        "sparse, s": [_seconds(pair.sparse, "ms") for pair in group],
        "dense : sparse": [_cell(pair.sparse, lambda one: f"{1 / one['ratio']:.2f}", "ratio") for pair in group],
        "density": [_cell(pair.sparse, lambda one: f"{one['density']:.2f}", "density") for pair in group],
        "without attention, s": [_seconds(pair.any, "linear_ms") for pair in group],
        "dense attention, s": [_seconds(pair.dense, "kernel_ms") for pair in group],
        "sparse: index, s": [_seconds(pair.sparse, "index_ms") for pair in group],
        "sparse: kernel, s": [_seconds(pair.sparse, "kernel_ms") for pair in group],
        "dense, all layers (extrapolated), s": [_seconds(pair.dense, "extrapolated_ms") for pair in group],
        "sparse, all layers (extrapolated), s": [_seconds(pair.sparse, "extrapolated_ms") for pair in group],
        "sparse, tokens/s": [
            _cell(pair.sparse, lambda one: f"{one['tokens_per_second']:,.0f}", "tokens_per_second") for pair in group
        ],
        "dense, ms/new token": [_cell(pair.dense, _decode, "decode_ms") for pair in group],
        "sparse, ms/new token": [_cell(pair.sparse, _decode, "decode_ms") for pair in group],
        "dense, GB": [_gigabytes(pair.dense) for pair in group],
        "sparse, GB": [_gigabytes(pair.sparse) for pair in group],
        "sparse, planned GB": [
            _cell(pair.sparse, lambda one: f"{one['planned_bytes'] / 1e9:.1f}", "planned_bytes") for pair in group
        ],
        "dense, J": [_cell(pair.dense, lambda one: f"{one['joules']:,.0f}", "joules") for pair in group],
        "sparse, J": [_cell(pair.sparse, lambda one: f"{one['joules']:,.0f}", "joules") for pair in group],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(one: dict[str, Any] | None, show: Any, name: str) -> str:
    return "" if one is None or one[name] is None else show(one)


def _seconds(one: dict[str, Any] | None, name: str) -> str:
    return _cell(one, lambda one: milliseconds(one[name] / 1e3), name)


def _decode(one: dict[str, Any]) -> str:
    return milliseconds(one["decode_ms"])


def _gigabytes(one: dict[str, Any] | None) -> str:
    return _cell(one, lambda one: f"{one['peak_bytes'] / 1e9:.1f}", "peak_bytes")


def _caption(group: Sequence[Pair]) -> str:
    first = group[0].any
    sparse = next((pair.sparse for pair in group if pair.sparse is not None), None)
    layers = f"{first['layers']} layers"
    if first["layers"] != first["model_layers"]:
        layers = f"the first {first['layers']} of {first['model_layers']} layers"
    said = [f"Prefill of {first['case']}, {layers}, {first['dtype']}"]
    if first["linear"] is not None:
        said.append(f"linear layers of {first['linear']}")
    if first["chunk_size"] is not None:
        said.append(f"{first['chunk_size']:,} tokens at a time")
    if first["kv_cache"] not in (None, "plain"):
        said.append(f"{first['kv_cache']} cache")
    text = f"{', '.join(said)}; medians, dense and sparse in turn."
    if sparse is not None:
        labels = {label(pair.sparse) for pair in group if pair.sparse is not None}
        what = f" ({labels.pop()})" if len(labels) == 1 else ""
        text += f" Sparse: {sparse['attention']}{what}, by `{sparse['implementation']}`; lists from {sparse['lists']}."
    dense = next((pair.dense for pair in group if pair.dense is not None), None)
    if dense is not None:
        text += f" Dense: by `{dense['implementation']}`."
    text += " Parts were timed alone, layer by layer, so they need not add up to the whole."
    return f"{text} {first['device']}; jax {first['jax']}, commit {first['commit']}, {first['date']}."

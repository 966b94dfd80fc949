"""Tables of the prefill suite: dense and sparse prefills of one run side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from minference_jax.bench.records import milliseconds

_MODEL = ("device", "case", "dtype", "layers", "chunk_size")  # of one table
_RUN = (*_MODEL, "linear", "kv_cache", "length")
_MEASURED = (
    *_RUN,
    *("attention", "pattern", "slash_granularity", "lists"),
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
    """Records of the prefill suite in pairs, by model and device; each group by length, then by what differs.

    What was measured again on a device is there once, as it was measured last.
    """
    newest = {tuple(one[name] for name in _MEASURED): one for one in records if one["suite"] == "prefill"}
    every = [one for one in records if one["suite"] == "prefill"]
    pairs = [Pair(_run_of(one, every), one) for one in newest.values() if one["attention"] != "dense"]
    told = [id(pair.dense) for pair in pairs]
    lone = [one for one in newest.values() if one["attention"] == "dense" and id(one) not in told]
    shown = {_values(pair.any, _RUN) for pair in pairs}
    pairs += [Pair(one, None) for one in lone if _values(one, _RUN) not in shown]
    groups: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_values(pair.any, _MODEL), []).append(pair)
    return [sorted(group, key=lambda pair: _order(pair.any)) for group in groups.values()]


def _values(one: dict[str, Any], names: Sequence[str]) -> tuple:
    return tuple(one[name] for name in names)


def _order(one: dict[str, Any]) -> tuple:
    return one["length"], one["attention"], label(one), one["kv_cache"] or "plain", one["linear"] or ""


def _run_of(sparse: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The dense prefill that a sparse one took turns with: its time is the sparse one's baseline."""
    for one in reversed(records):
        same = all(one[name] == sparse[name] for name in (*_RUN, "commit"))
        if same and one["attention"] == "dense" and one["ms"] == sparse["baseline_ms"]:
            return one
    return None


def label(one: dict[str, Any]) -> str:
    """What the heads of a sparse prefill keep, in a table; of a dense one nothing."""
    if one["attention"] == "dense":
        return ""
    blocks = ", block diagonals" if one["slash_granularity"] == "block" else ""
    return f"{one['pattern']}{blocks}"


def variant(one: dict[str, Any]) -> str:
    """What is unusual about the cache and the linear layers of a prefill, to be set behind a name; usually nothing."""
    cache = "" if one["kv_cache"] in (None, "plain") else f", {one['kv_cache']} cache"
    return cache if one["linear"] is None else f"{cache}, {one['linear']} linear layers"


def prefill_table(records: Iterable[dict[str, Any]]) -> str:
    """Markdown: for each model and device a table of whole prefills, one of their parts, and where and with what.

    Columns that no row has are left out. Without records of the suite the text is empty.
    """
    groups = prefill_groups(list(records))
    return "\n\n".join("\n\n".join((_wholes(group), *_parts(group), _caption(group))) for group in groups)


def _wholes(group: Sequence[Pair]) -> str:
    is_part = any(pair.any["extrapolated_ms"] is not None for pair in group)
    columns = {
        "dense, s": [_seconds(pair.dense, "ms") for pair in group],
        "sparse, s": [_seconds(pair.sparse, "ms") for pair in group],
        "dense : sparse": [_cell(pair.sparse, lambda one: f"{1 / one['ratio']:.2f}", "ratio") for pair in group],
        "density": [_cell(pair.sparse, lambda one: _share(one["density"]), "density") for pair in group],
        "dense, all layers (extrapolated), s": [_seconds(pair.dense, "extrapolated_ms") for pair in group],
        "sparse, all layers (extrapolated), s": [_seconds(pair.sparse, "extrapolated_ms") for pair in group],
        "sparse, tokens/s": ["" if is_part else _whole(pair.sparse, "tokens_per_second") for pair in group],
        "dense, ms/new token": [_cell(pair.dense, _decode, "decode_ms") for pair in group],
        "sparse, ms/new token": [_cell(pair.sparse, _decode, "decode_ms") for pair in group],
        "dense, GB": [_gigabytes(pair.dense, "peak_bytes") for pair in group],
        "sparse, GB": [_gigabytes(pair.sparse, "peak_bytes") for pair in group],
        "planned, GB": [_gigabytes(pair.sparse, "planned_bytes") for pair in group],
        "dense, J": [_whole(pair.dense, "joules") for pair in group],
        "sparse, J": [_whole(pair.sparse, "joules") for pair in group],
    }
    return _table(_what(group) | columns)


def _parts(group: Sequence[Pair]) -> list[str]:
    """The table of parts, if any were timed."""
    timed = [pair for pair in group if pair.any["kernel_ms"] is not None]
    if not timed:
        return []
    columns = {
        "without attention, s": [_seconds(pair.any, "linear_ms") for pair in timed],
        "of it writes to the cache, s": [_seconds(pair.any, "cache_ms") for pair in timed],
        "dense attention, s": [_seconds(pair.dense, "kernel_ms") for pair in timed],
        "sparse: estimate and layout, s": [_seconds(pair.sparse, "index_ms") for pair in timed],
        "sparse: kernel, s": [_seconds(pair.sparse, "kernel_ms") for pair in timed],
    }
    return [_table(_what(timed) | columns)]


def _what(group: Sequence[Pair]) -> dict[str, list[str]]:
    """The columns that say what a row is of."""
    labels = [label(pair.any) for pair in group]
    return {
        "tokens": [f"{pair.any['length']:,}" for pair in group],
        "attention": _differing(group, "attention", ""),
        "sparse heads": labels if len(set(labels)) > 1 else [],
        "cache": _differing(group, "kv_cache", "plain"),
        "linear layers": _differing(group, "linear", group[0].any["dtype"]),
    }


def _table(columns: dict[str, list[str]]) -> str:
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _differing(group: Sequence[Pair], name: str, usual: str) -> list[str]:
    """A column of what differs between the rows; none where nothing does."""
    cells = [pair.any[name] or usual for pair in group]
    return cells if len(set(cells)) > 1 else []


def _cell(one: dict[str, Any] | None, show: Any, name: str) -> str:
    return "" if one is None or one[name] is None else show(one)


def _seconds(one: dict[str, Any] | None, name: str) -> str:
    return _cell(one, lambda one: milliseconds(one[name] / 1e3), name)


def _decode(one: dict[str, Any]) -> str:
    return milliseconds(one["decode_ms"])


def _gigabytes(one: dict[str, Any] | None, name: str) -> str:
    return _cell(one, lambda one: f"{one[name] / 1e9:.1f}", name)


def _whole(one: dict[str, Any] | None, name: str) -> str:
    return _cell(one, lambda one: f"{one[name]:,.0f}", name)


def _share(value: float) -> str:
    return f"{value:.{2 if value >= 0.1 else 3}f}"


def _caption(group: Sequence[Pair]) -> str:
    first = group[0].any
    sparse = next((pair.sparse for pair in reversed(group) if pair.sparse is not None), None)
    layers = f"{first['layers']} layers"
    if first["layers"] != first["model_layers"]:
        layers = f"the first {first['layers']} of {first['model_layers']} layers"
    said = [f"Prefill of {first['case']}, {layers}, {first['dtype']}"]
    if first["linear"] is not None and not _differing(group, "linear", first["dtype"]):
        said.append(f"linear layers of {first['linear']}")
    if first["chunk_size"] is not None:
        said.append(f"{first['chunk_size']:,} tokens at a time")
    if first["kv_cache"] not in (None, "plain") and not _differing(group, "kv_cache", "plain"):
        said.append(f"{first['kv_cache']} cache")
    text = f"{', '.join(said)}; medians, dense and sparse in turn."
    if sparse is not None:
        labels = {label(pair.sparse) for pair in group if pair.sparse is not None}
        what = f" ({labels.pop()})" if len(labels) == 1 else ""
        lists = " or ".join(dict.fromkeys(pair.sparse["lists"] for pair in group if pair.sparse is not None))
        text += f" Sparse: {sparse['attention']}{what}, by `{sparse['implementation']}`; lists from {lists}."
    dense = next((pair.dense for pair in group if pair.dense is not None), None)
    if dense is not None:
        text += f" Dense: by `{dense['implementation']}`."
    if _parts(group):
        text += " Parts were timed alone, layer by layer, so they need not add up to the whole."
    rows = [one for pair in group for one in pair if one is not None]
    commits, versions, dates = (
        " and ".join(dict.fromkeys(str(one[name]) for one in rows)) for name in ("commit", "jax", "date")
    )
    return f"{text} {first['device']}; jax {versions}, commit {commits}, {dates}."

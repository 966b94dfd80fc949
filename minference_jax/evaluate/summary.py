"""Tables of results: scores with intervals and differences from dense attention, by task, length and attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minference_jax.evaluate.journal import ENVIRONMENT, PERPLEXITY
from minference_jax.evaluate.statistics import Interval, mean_of_means, mean_score, paired_difference, quantile

FIELDS = (
    *("task", "length", "positions", "attention", "pattern", "density", "samples", "metric"),
    *("value", "low", "high", "interval", "difference", "difference_low", "difference_high", "difference_interval"),
    *("lost", "gained", "confidence"),
    *ENVIRONMENT,
)
"""Of a row. value: mean score, or perplexity. difference: from dense attention on the same samples, of scores, or of
negative log-likelihoods in nats a token; null for dense itself. lost, gained: samples with a lower and a higher score
than dense attention's. samples: tokens, for perplexity. positions: [first, end), where it is that of a range. Device,
driver, versions, commit and date are those with which the row's samples were asked, several of them joined by "and"."""


def summarize(records: Iterable[Mapping[str, Any]], confidence: float = 0.95) -> list[dict[str, Any]]:
    """Rows of FIELDS for what an evaluation found; tasks of one length also together, as task "all".

    Scores have Wilson's interval where all of a task are 0 or 1, each about a context of its own, else the bootstrap's;
    differences the paired bootstrap's; perplexities and their differences a normal one from the standard error over
    tokens, as if these were independent. Of "all" the value, the difference and the density are the mean of the tasks'
    own, however many samples each has, with the stratified bootstrap's interval.

    Args:
        records: of `evaluate_answers` or `evaluate_perplexity`, or both.
        confidence: of the intervals, between 0 and 1.

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    quantile(confidence)
    answers: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    texts: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["task"] == PERPLEXITY:
            texts.setdefault(record["length"], []).append(record)
        else:
            answers.setdefault((record["task"], record["length"]), []).append(record)
    rows = [row for (task, _), group in answers.items() for row in _scores(task, [group], confidence)]
    for length in dict.fromkeys(length for _, length in answers):
        tasks = [group for (_, other), group in answers.items() if other == length]
        if len(tasks) > 1:
            rows += _scores("all", tasks, confidence)
    for group in texts.values():
        rows += _perplexities(group, confidence)
    return rows


def _by_attention(group: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in group:
        found.setdefault(record["attention"], []).append(record)
    return found


def _row(
    task: str, groups: Sequence[Sequence[Mapping[str, Any]]], others: Sequence[Mapping[str, Any]], **fields: Any
) -> dict[str, Any]:
    """A row with what all kinds have: the pattern, or how many there are, the mean density, and the environment.

    groups: records of the attention, by task. others: those that it is compared with.
    """
    group = [record for one in groups for record in one]
    patterns = list(dict.fromkeys(record["pattern"] for record in group))
    named = {
        "task": task,
        "length": group[0]["length"],
        "attention": group[0]["attention"],
        "pattern": patterns[0] if len(patterns) == 1 else f"{patterns[0]} and {len(patterns) - 1} more",
        "density": float(np.mean([np.mean([record["density"] for record in one]) for one in groups])),
    }
    for name in ENVIRONMENT:
        found = dict.fromkeys(record["environment"][name] for record in (*group, *others))
        named[name] = " and ".join(map(str, found)) if len(found) > 1 else next(iter(found))
    return {name: {**named, **fields}.get(name) for name in FIELDS}


class _Paired(NamedTuple):
    """Records of an attention and a task, and dense attention's of the same samples."""

    own: list[Mapping[str, Any]]
    dense: list[Mapping[str, Any]]

    @property
    def contexts(self) -> list[int]:
        return [record["context"] for record in self.own]

    @property
    def scores(self) -> list[float]:
        return [record["score"] for record in self.own]

    @property
    def differences(self) -> list[float]:
        return [one["score"] - other["score"] for one, other in zip(self.own, self.dense, strict=True)]


def _scores(task: str, groups: Sequence[Sequence[Mapping[str, Any]]], confidence: float) -> list[dict[str, Any]]:
    """Rows of every attention that was asked in all groups, each the records of a task."""
    whole = {record["score"] for group in groups for record in group} <= {0, 1}  # one kind of interval for all
    dense = {_sample(record): record for group in groups for record in group if record["attention"] == "dense"}
    rows = []
    for name in dict.fromkeys(record["attention"] for group in groups for record in group):
        own = [[one for one in group if one["attention"] == name and _sample(one) in dense] for group in groups]
        if not all(own):  # not asked yet
            continue
        pairs = [_Paired(found, [dense[_sample(record)] for record in found]) for found in own]
        metrics = {record["metric"] for found in own for record in found}
        value = _mean_score(pairs, confidence, whole)
        fields: dict[str, Any] = {
            "samples": sum(map(len, own)),
            "metric": metrics.pop() if len(metrics) == 1 else "each task's own",
            "value": value.value,
            "low": value.low,
            "high": value.high,
            "interval": value.kind,
            "confidence": confidence,
        }
        if name != "dense":
            difference = _difference(pairs, confidence)
            fields |= {"difference": difference.value, "difference_low": difference.low}
            fields |= {"difference_high": difference.high, "difference_interval": f"paired {difference.kind}"}
            fields["lost"] = sum(x < 0 for one in pairs for x in one.differences)
            fields["gained"] = sum(x > 0 for one in pairs for x in one.differences)
        rows.append(_row(task, own, [record for one in pairs for record in one.dense], **fields))
    return rows


def _mean_score(pairs: Sequence[_Paired], confidence: float, whole: bool) -> Interval:
    if len(pairs) > 1:
        return mean_of_means([(one.scores, one.contexts) for one in pairs], confidence)
    return mean_score(pairs[0].scores, pairs[0].contexts, confidence, all_or_nothing=whole)


def _difference(pairs: Sequence[_Paired], confidence: float) -> Interval:
    if len(pairs) > 1:
        return mean_of_means([(one.differences, one.contexts) for one in pairs], confidence)
    others = [record["score"] for record in pairs[0].dense]
    return paired_difference(pairs[0].scores, others, pairs[0].contexts, confidence)


def _sample(record: Mapping[str, Any]) -> tuple[str, int, int]:
    return record["task"], record["length"], record["index"]


def _perplexities(group: Sequence[Mapping[str, Any]], confidence: float) -> list[dict[str, Any]]:
    rows = []
    for name, found in _by_attention(group).items():
        ends, counts = found[0]["ends"], np.sum([record["counts"] for record in found], axis=0)
        keys = ("nll", "nll_squares", *(("above", "above_squares") if name != "dense" else ()))
        totals = {key: np.sum([record[key] for record in found], axis=0) for key in keys}
        places = [(None, slice(None)), *(([low, high], slice(i, i + 1)) for i, (low, high) in enumerate(_ranges(ends)))]
        for positions, place in places:
            of = {key: float(values[place].sum()) for key, values in totals.items()}
            count = int(counts[place].sum())
            mean, reach = _mean(of["nll"], of["nll_squares"], count, confidence)
            fields = {
                "positions": positions,
                "samples": count,
                "metric": "perplexity",
                "value": math.exp(mean),
                "low": math.exp(mean - reach),
                "high": math.exp(mean + reach),
                "interval": "standard error",
                "confidence": confidence,
            }
            if name != "dense":
                mean, reach = _mean(of["above"], of["above_squares"], count, confidence)
                fields |= {"difference": mean, "difference_low": mean - reach, "difference_high": mean + reach}
                fields["difference_interval"] = "paired standard error"
            rows.append(_row(PERPLEXITY, [found], group if name != "dense" else (), **fields))
    return rows


def _ranges(ends: Sequence[int]) -> list[tuple[int, int]]:
    """Positions [first, end) of the tokens that are predicted: the first token of a text is not."""
    return [(low + 1, high + 1) for low, high in zip([0, *ends[:-1]], ends, strict=True)]


def _mean(total: float, squares: float, count: int, confidence: float) -> tuple[float, float]:
    """The mean, and how far its interval reaches to either side."""
    mean = total / count
    variance = max(squares / count - mean * mean, 0.0) * count / max(count - 1, 1)
    return mean, quantile(confidence) * math.sqrt(variance / count)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text for a terminal; perplexity by position is left to JSON and plots."""
    head = ("task", "tokens", "attention", "density", "samples", "value", "interval", "less dense", "interval", "- / +")
    cells = [head]
    for row in rows:
        if row["positions"] is not None:
            continue
        cells.append(
            (
                row["task"],
                f"{row['length']:,}",
                row["attention"],
                f"{row['density']:.3f}",
                f"{row['samples']:,}",
                f"{row['value']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                "" if row["difference"] is None else f"{row['difference']:+.4f}",
                "" if row["difference"] is None else f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}",
                "" if row["lost"] is None else f"{row['lost']} / {row['gained']}",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)

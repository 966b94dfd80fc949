"""Tables of results: differences from dense attention on the same samples, and tasks together."""

import numpy as np
import pytest

from minference_jax.evaluate import summarize, table
from minference_jax.evaluate.journal import ENVIRONMENT

HERE = dict.fromkeys(ENVIRONMENT, "x")


def record(task, index, attention, score, density=0.5, **more):
    made = {"task": task, "length": 700, "index": index, "context": index, "attention": attention, "score": score}
    made |= {"density": 1.0 if attention == "dense" else density, "pattern": None, "metric": "m", "about": {}}
    return made | {"environment": HERE} | more


def test_summary_compares_with_dense_on_the_same_samples():
    scores = {"dense": [1, 1, 0, 1], "sparse": [1, 0, 1, 0]}
    found = [record("a", i, name, score) for name, row in scores.items() for i, score in enumerate(row)]
    found += [record("b", i, name, score / 2) for name, row in scores.items() for i, score in enumerate(row)]
    found.append(record("a", 9, "sparse", 1))  # not asked dense yet
    rows = {(row["task"], row["attention"]): row for row in summarize(found)}
    assert set(rows) == {(task, name) for task in ("a", "b", "all") for name in ("dense", "sparse")}
    sparse = rows["a", "sparse"]
    assert (sparse["value"], sparse["samples"], sparse["lost"], sparse["gained"]) == (0.5, 4, 2, 1)
    assert sparse["difference"] == -0.25
    assert (sparse["interval"], rows["b", "sparse"]["interval"]) == ("wilson", "bootstrap")
    assert sparse["difference_low"] <= -0.25 <= sparse["difference_high"]
    assert rows["a", "dense"]["difference"] is None
    halved = [one | {"score": 0} if one["attention"] == "sparse" else one for one in found if one["task"] == "b"]
    assert {row["interval"] for row in summarize(halved)} == {"bootstrap"}  # one kind for a task, whoever scores 0
    assert rows["all", "dense"]["value"] == pytest.approx((0.75 + 0.375) / 2)
    text = table(summarize(found))
    assert text.splitlines()[0].split()[:3] == ["task", "tokens", "attention"]
    assert "2 / 1" in text


def test_tasks_together_count_alike_however_many_samples_they_have():
    found = [record("a", i, name, 1) for name in ("dense", "sparse") for i in range(2)]
    found += [record("b", i, "dense", i % 2) for i in range(20)]
    found += [record("b", i, "sparse", 0, density=0.1) for i in range(20)]
    rows = {row["attention"]: row for row in summarize(found) if row["task"] == "all"}
    assert (rows["dense"]["value"], rows["dense"]["samples"]) == (0.75, 22)
    assert rows["sparse"]["difference"] == -0.25
    assert rows["sparse"]["density"] == pytest.approx(0.3)
    assert (rows["sparse"]["lost"], rows["sparse"]["gained"]) == (10, 0)
    assert rows["dense"]["interval"] == "stratified bootstrap"
    assert rows["sparse"]["difference_interval"] == "paired stratified bootstrap"
    error = 0.5 * np.sqrt(0.25 / 20)  # that of task b, halved: no sample of task a differs
    assert rows["dense"]["low"] == pytest.approx(0.75 - 1.96 * error, abs=0.03)
    assert rows["sparse"]["difference_high"] == pytest.approx(-0.25 + 1.96 * error, abs=0.03)
    assert not [
        row for row in summarize(found[:4] + found[4:24]) if (row["task"], row["attention"]) == ("all", "sparse")
    ]

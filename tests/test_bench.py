import json
import runpy
from pathlib import Path

import pytest

from minference_jax import cli
from minference_jax.bench import attention, records

ROOT = Path(__file__).parent.parent


def test_bench_checks_the_oracle_then_records_every_field(tmp_path, capsys):
    output = tmp_path / "folder" / "results.jsonl"
    assert cli.main(["bench", "attention", "--lengths", "1100", "--repeats", "1", "--output", str(output)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == records.read(output)
    assert len(printed) == len(attention.CASES)
    for one in printed:
        assert tuple(one) == records.FIELDS
        assert one["error"] <= attention.TOLERANCE
        assert one["ratio"] == one["ms"] / one["baseline_ms"]
        assert one["density"] > 0


def test_a_wrong_result_prints_no_time(monkeypatch):
    monkeypatch.setattr(attention, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="against the oracle"):
        next(attention.run(lengths=(64,), repeats=1))


def test_a_field_that_records_do_not_have_is_refused():
    with pytest.raises(ValueError, match="unknown fields"):
        records.record(milliseconds=3)


def test_readme_tables_are_those_of_the_recorded_results():
    updated = runpy.run_path(str(ROOT / "benchmarks" / "update_readme.py"))["updated"]
    assert (ROOT / "README.md").read_text() == updated()

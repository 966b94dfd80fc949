"""Records of measurements, and the tables and plots that are made of them."""

import json
import runpy
from pathlib import Path

import pytest

from minference_jax.bench import records

ROOT = Path(__file__).parent.parent


def test_a_field_that_records_do_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown fields"):
        records.record(milliseconds=3)
    records.append(tmp_path / "results.jsonl", {"milliseconds": 3})
    with pytest.raises(ValueError, match="unknown fields"):
        records.read(tmp_path / "results.jsonl")


def test_fields_that_an_older_record_lacks_are_null(tmp_path):
    records.append(tmp_path / "results.jsonl", {"suite": "attention", "ms": 3.0})
    (one,) = records.read(tmp_path / "results.jsonl")
    assert tuple(one) == records.FIELDS
    assert (one["ms"], one["kernel_ms"]) == (3.0, None)


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_record_that_was_being_written_is_taken_off_and_no_other_line_is(cut, tmp_path):
    path, line = tmp_path / "results.jsonl", json.dumps({"suite": "attention", "ms": 3.0, "jax": "0" * 40})
    path.write_text(f"{line}\n{line[:cut]}")
    assert len(records.read(path)) == 1
    records.append(path, {"suite": "attention", "ms": 4.0})
    assert [one["ms"] for one in records.read(path)] == [3.0, 4.0]
    path.write_text(f"{line}\n{line}")  # whole, but for its line feed
    records.append(path, {"suite": "attention", "ms": 4.0})
    assert [one["ms"] for one in records.read(path)] == [3.0, 3.0, 4.0]
    path.write_text("notes of mine")
    records.append(path, {"suite": "attention", "ms": 4.0})
    assert path.read_text().startswith("notes of mine\n{")
    with pytest.raises(ValueError, match=r"results\.jsonl: line 1 is no record"):
        records.read(path)


def example(**given):
    """A record with made-up figures, for tables and plots only."""
    figures = {"ms": 10.0, "ms_spread": [9.0, 11.0], "estimate_ms": 1.0, "index_ms": 2.0, "kernel_ms": 8.0}
    figures |= {"baseline_ms": 40.0, "ratio": 0.25, "tflops_kept": 300.0, "tflops_baseline": 600.0, "density": 0.08}
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "length": 8192}
    names = {"suite": "attention", "case": "VS line", "implementation": "triton", "tiles": "64x64x4x2"}
    names |= {"baseline": "jax.nn.dot_product_attention, cudnn", "device": "a GPU", "commit": "abc"}
    return records.record(**{**figures, **shape, **names, **given})


def test_a_table_for_each_device_and_commit_has_the_newest_of_equal_records():
    rows = [
        example(length=32768),
        example(case="dense", index_ms=None, estimate_ms=None),
        example(ms=7.0),
        example(ms=5.0, pattern="VS(1000, 600)"),
        example(device="a CPU", kernel_ms=None, tflops_baseline=None),
        example(suite="another"),
    ]
    table = records.attention_table(rows)
    first, _, second, _ = table.split("\n\n")
    assert [line.split(" | ")[:2] for line in first.splitlines()[2:]] == [
        ["| 8,192", "VS line; VS(1000, 600)"],
        ["| 32,768", "VS line"],
        ["| 8,192", "dense"],
    ]
    assert first.splitlines()[2].endswith("| 0.080 | 40.0 | 5.00 | 8.00 | 8.00 | 0.50 |")
    assert "kernel" in first
    assert "kernel" not in second.splitlines()[0]
    assert records.attention_table([]) == "Nothing is recorded for this release yet."


def test_what_was_measured_again_stands_in_the_newest_table_alone():
    rows = [example(commit="old"), example(commit="old", length=32768), example(commit="new", ms=4.0)]
    assert [[row["commit"] for row in group] for group in records.groups(rows)] == [["old", "old"], ["new"]]
    old, new = records.groups(rows, newest_only=True)
    assert [(row["commit"], row["length"]) for row in (*old, *new)] == [("old", 32768), ("new", 8192)]


def test_readme_tables_are_those_of_the_recorded_results():
    updated = runpy.run_path(str(ROOT / "benchmarks" / "update_readme.py"))["updated"]
    for path, text in updated().items():
        assert path.read_text() == text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_are_drawn_of_records_old_and_new(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    draw = runpy.run_path(str(ROOT / "benchmarks" / "plot.py"))["draw"]
    new = [example(length=length, case=case) for case in ("VS line", "VS block") for length in (8192, 32768)]
    old = records.read(ROOT / "benchmarks" / "results" / "attention.jsonl")[:2]
    old = [one | dict.fromkeys(("tflops_baseline", "index_ms", "kernel_ms", "estimate_ms")) for one in old]
    paths = draw([*new, *old], tmp_path / "plots", suffix)
    named = [path.stem.rpartition("_")[2] for path in paths]
    assert named == ["time", "speedup", "rate", "shares", "time", "speedup", "rate"]
    assert all(path.stat().st_size > 0 for path in paths)

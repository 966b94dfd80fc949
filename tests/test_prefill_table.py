"""Tables and plots of whole prefills, from made-up records."""

import runpy
from pathlib import Path

import pytest

from minference_jax.bench import prefill_table, records

ROOT = Path(__file__).parent.parent


def example(**given):
    """A record with made-up figures, for tables and plots only."""
    figures = {"ms": 4000.0, "ms_spread": [3900.0, 4100.0], "linear_ms": 3000.0, "kernel_ms": 900.0, "joules": 2500.0}
    figures |= {"tokens_per_second": 32768.0, "peak_bytes": 45_000_000_000, "density": 1.0}
    names = {"suite": "prefill", "case": "llama3-8b", "attention": "dense", "implementation": "cudnn"}
    names |= {"device": "a GPU", "commit": "abc", "dtype": "bfloat16", "length": 131072, "layers": 32}
    return records.record(**{**names, **figures, "model_layers": 32, **given})


def pair(dense_ms=12000.0, **given):
    """Records of a run: dense, then sparse."""
    sparse = {"attention": "minference", "pattern": "found.json", "implementation": "triton", "index_ms": 60.0}
    sparse |= {"lists": "activations of random weights", "density": 0.25, "slash_granularity": "line"}
    sparse |= {"baseline_ms": dense_ms, "ratio": dense_ms and 4000.0 / dense_ms}
    dense = {"ms": dense_ms, "kernel_ms": dense_ms and dense_ms - 3000}
    return [example(**{**dense, **given}), example(**{**sparse, **given})]


def test_a_table_has_dense_beside_sparse_and_what_was_measured_again_once():
    rows = [*pair(dense_ms=11000.0), *pair(), *pair(length=8192, dense_ms=5000.0), {**example(), "suite": "attention"}]
    table = prefill_table.prefill_table(rows)
    head, _, *lines = table.splitlines()
    assert "extrapolated" not in head
    assert [line.split(" | ")[:5] for line in lines[:2]] == [
        ["| 8,192", "5.00", "4.00", "1.25", "0.25"],
        ["| 131,072", "12.0", "4.00", "3.00", "0.25"],
    ]
    assert lines[2] == ""
    assert lines[3].startswith("| tokens | without attention, s | dense attention, s |")
    assert [line.split(" | ")[:3] for line in lines[5:7]] == [
        ["| 8,192", "3.00", "2.00"],
        ["| 131,072", "3.00", "9.00"],
    ]
    assert "Sparse: minference (found.json), by `triton`; lists from activations of random weights." in table
    assert "llama3-8b, 32 layers, bfloat16;" in table


def test_answers_and_auto_stand_in_columns_of_their_own():
    rows = [*pair(decode_ms=20.0), *pair(length=8192, attention="auto")[1:]]
    table = prefill_table.prefill_table(rows)
    assert "| dense, ms/new token | sparse, ms/new token |" in table
    assert [line.split(" | ")[1] for line in table.splitlines()[2:4]] == ["auto", "minference"]
    assert "| 20.0 | 20.0 |" in table.splitlines()[3]


def test_caches_linear_layers_and_commits_share_a_table():
    rows = [*pair(), *pair(linear="fp8", dense_ms=9000.0, commit="later"), *pair(kv_cache="int8", dense_ms=None)[1:]]
    table = prefill_table.prefill_table(rows)
    lines = [line.split(" | ") for line in table.splitlines()]
    assert lines[0][:4] == ["| tokens", "cache", "linear layers", "dense, s"]
    assert [line[1:4] for line in lines[2:5]] == [
        ["int8", "bfloat16", ""],
        ["plain", "bfloat16", "12.0"],
        ["plain", "fp8", "9.00"],
    ]
    assert "commit abc and later" in table


def test_a_table_says_what_is_extrapolated_and_leaves_out_what_did_not_fit():
    given = {"layers": 8, "extrapolated_ms": 48000.0}
    dense, sparse = pair(**given)
    table = prefill_table.prefill_table([dense, sparse])
    assert "dense, all layers (extrapolated), s" in table
    assert "the first 8 of 32 layers" in table
    alone = sparse | {"baseline_ms": None, "ratio": None}
    assert prefill_table.prefill_table([alone]).splitlines()[2].startswith("| 131,072 | 4.00 | 0.25 |")
    assert prefill_table.prefill_table([dense]).splitlines()[2].startswith("| 131,072 | 12.0 | 48.0 |")
    assert prefill_table.prefill_table([]) == prefill_table.prefill_table([{**example(), "suite": "models"}]) == ""


def test_the_section_of_all_results_has_tables_and_pictures(tmp_path):
    section = runpy.run_path(str(ROOT / "benchmarks" / "update_readme.py"))["prefill_section"]
    (tmp_path / "a_gpu_prefill_times.png").touch()
    text = section(pair(), tmp_path)
    assert text.startswith(prefill_table.prefill_table(pair()))
    assert text.endswith("\n\n![Seconds of whole prefills by length](plots/a_gpu_prefill_times.png)")


def test_the_headline_says_where_dense_is_reckoned_from_some_layers():
    table = runpy.run_path(str(ROOT / "benchmarks" / "update_readme.py"))["whole_prefills_table"]
    given = {"length": 1048576, "kv_cache": "int8"}
    some = pair(**given, layers=2, dense_ms=39000.0, extrapolated_ms=624000.0)
    whole = pair(**given, dense_ms=None, ms=30000.0)[1]
    short = [one | {"kv_cache": "plain"} for one in pair()]
    lines = table([*some, whole, *short]).splitlines()
    assert lines[2] == "| 131,072 | minference | plain | bfloat16 | 12 | 4 | 3.00 | 45.0 |"
    assert lines[3].split(" | ")[3:7] == ["bfloat16", "624, from 2 layers", "30", "20.8, from 2 layers"]
    assert "lists from activations of random weights (131,072, 1,048,576)" in lines[-1]


def test_plots_are_drawn_of_whole_prefills(tmp_path):
    pytest.importorskip("matplotlib")
    draw = runpy.run_path(str(ROOT / "benchmarks" / "plot.py"))["draw_prefills"]
    without_parts = [row | {"device": "another", "kernel_ms": None} for row in (*pair(), *pair(length=8192))]
    rows = [*pair(), *pair(length=8192), *without_parts, *pair(device="of one length")]
    paths = draw(rows, tmp_path / "plots")
    kinds = [path.stem.partition("_prefill_")[2] for path in paths]
    assert sorted(kinds) == ["parts", "parts", "times", "times"]
    assert all(path.stat().st_size > 0 for path in paths)
    assert draw([], tmp_path / "nothing") == []
    assert not (tmp_path / "nothing").exists()

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import write_model

from minference_jax import cli, implementations
from minference_jax.bench import attention, cases, inputs, oracle, records
from minference_jax.kernels.layouts import SparseLayout, computed_keys, density, layout_mask
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import AShape, BlockSparse, Dense, VerticalSlash

ROOT = Path(__file__).parent.parent
NEAREST = cases.CPU_CASES[1].name  # the least work
XLA = {entry.name: entry for entry in implementations.IMPLEMENTATIONS}["xla"]
SLASHES = cases.Sizes(pattern=VerticalSlash(vertical_size=40, slash_size=70), local_share=0.9)
SMALL = cases.Case(
    name="small", sizes=(SLASHES,), num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32", lengths=(300,)
)
KINDS = {
    "line": SMALL,
    "block": dataclasses.replace(SMALL, slash_granularity="block"),
    "A-shape": dataclasses.replace(SMALL, sizes=(cases.Sizes(pattern=AShape(sink_size=20, window_size=90)),)),
    "block-sparse": dataclasses.replace(
        SMALL, sizes=(cases.Sizes(pattern=BlockSparse(num_blocks=1), density=0.4),), dtype="bfloat16"
    ),
    "dense": dataclasses.replace(SMALL, sizes=(cases.Sizes(pattern=Dense()),), num_kv_heads=1),
}
TILES = {"64x64": TileConfig(), "128x64": TileConfig(block_q=128), "32x16": TileConfig(block_q=32, block_kv=16)}


@pytest.fixture
def short_check(monkeypatch):
    monkeypatch.setattr(attention, "CHECK_LENGTH", 256)


def constructed(case, length, tiles):
    return inputs.constructed_layout(case, length, tiles, num_columns=length)


def meaning(layout, length, tiles):
    return layout_mask(layout, jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32), length, length, tiles)


def test_bench_checks_the_oracle_then_records_every_field(tmp_path, capsys):
    output = tmp_path / "folder" / "results.jsonl"
    options = ["--lengths", "1100", "--repeats", "2", "--implementation", "xla", "--cases", NEAREST]
    assert cli.main(["bench", "attention", *options, "--baseline-repeats", "1", "--output", str(output)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == records.read(output)
    (one,) = printed
    assert tuple(one) == records.FIELDS
    assert one["error"] <= oracle.TOLERANCES["float32"]
    assert one["ms"] == one["index_ms"] + one["kernel_ms"]
    assert one["ratio"] == one["ms"] / one["baseline_ms"]
    assert one["ms_spread"][0] <= one["ms"] <= one["ms_spread"][1]
    assert (one["lists"], one["tiles"], one["slash_granularity"]) == ("constructed", "64x64x4x2", "line")
    assert one["density"] > 0
    assert one["driver"] is None


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize("kind", KINDS)
def test_cases_of_every_kind_pass_their_checks_and_are_measured(kind):
    case = KINDS[kind]
    one = attention.Bench(implementation="xla", repeats=1).measure(case, 600)
    assert 0 < one["error"] <= oracle.TOLERANCES[case.dtype]
    assert (one["index_ms"] is None) == (kind == "dense")
    assert (one["estimate_ms"] is None) == (kind not in ("line", "block"))
    assert (one["density"] == pytest.approx(1)) == (kind == "dense")


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize("threshold", [None, 0.01])
def test_a_threshold_is_timed_beside_none_and_its_error_measured_whatever_it_is(monkeypatch, threshold):
    def sparse(*args, skip_threshold=None, **where):
        out, lse = XLA.sparse(*args, **where)
        return out if skip_threshold is None else out + 50 * skip_threshold, lse

    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", (XLA._replace(sparse=sparse),))
    one = attention.Bench(repeats=1, skip_threshold=threshold).measure(SMALL, 300)
    assert one["error"] <= oracle.TOLERANCES["float32"]
    assert one["kernel_ms"] > 0
    assert one["skip_threshold"] == threshold
    assert one["skip_error"] == (None if threshold is None else pytest.approx(0.5, abs=1e-4))
    assert (one["skip_ms"] is None) == (threshold is None)


def wrong(sparse, length):
    """A kernel that at one length gives the last rows of head 1 a little too much."""

    def attend(q, k, v, layout, **where):
        out, lse = sparse(q, k, v, layout, **where)
        return (out.at[:, 250:, 1].add(0.05) if q.shape[1] == length else out), lse

    return attend


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize(("dtype", "length"), [("float32", 256), ("bfloat16", 300)])
def test_a_wrong_kernel_is_given_no_time(monkeypatch, dtype, length):
    entry = XLA._replace(sparse=wrong(XLA.sparse, length))
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", (entry,))
    monkeypatch.setattr(attention, "timed", lambda *_: pytest.fail("it was timed"))
    case = dataclasses.replace(SMALL, dtype=dtype)
    with pytest.raises(oracle.WrongResult, match=f"small, xla, {length} tokens: .* no time is measured"):
        attention.Bench().measure(case, 300)


@pytest.mark.parametrize("wrong", [jnp.nan, 1.1])
@pytest.mark.parametrize("dtype", oracle.TOLERANCES)
def test_errors_are_found_in_any_row_whatever_they_are(dtype, wrong):
    tiles, where = TILES["32x16"], {"scale": 0.25, "dtype": dtype}
    qkv = inputs.random_activations(dataclasses.replace(SMALL, dtype=dtype), 100)
    layout = constructed(KINDS["dense"], 100, tiles)
    out = implementations.flash_xla.attention(
        *qkv, scale=0.25, q_offset=jnp.zeros(1, jnp.int32), kv_len=jnp.full(1, 100), tiles=tiles
    )[0]
    for find in (oracle.whole_error, oracle.sampled_error):
        assert 0 < float(find(qkv, out, layout, tiles=tiles, **where)) <= oracle.TOLERANCES[dtype]
        broken = out.at[0, 98:, 3].multiply(wrong)
        with pytest.raises(oracle.WrongResult, match="a name: the error"):
            oracle.check(float(find(qkv, broken, layout, tiles=tiles, **where)), dtype, "a name")


def test_a_wrong_baseline_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "CHECK_LENGTH", 128)
    monkeypatch.setattr(attention, "dense_attention", lambda q, k, v, **_: q * jnp.nan)
    with pytest.raises(oracle.WrongResult, match="dense_attention, xla"):
        attention.Bench()._check(SMALL)


def test_bench_says_what_is_wrong_or_too_large_and_goes_on_with_the_others(monkeypatch, capsys):
    def measure(self, case, length):
        if length == 100:
            raise oracle.WrongResult("it is wrong")
        if length == 200:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand pages more")
        return {"length": length}

    monkeypatch.setattr(attention.Bench, "_measure", measure)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "attention", "--lengths", "300", "100", "200", "--cases", NEAREST])
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert json.loads(said.out) == {"length": 300}
    first, second = said.err.splitlines()
    assert first == "minference-jax: error: it is wrong"
    assert "at 200 tokens, 9 heads over 3 KV heads of head_dim 64, float32, does not fit the device" in second


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cases", "nothing"], "no case has 'nothing' in its name"),
        (["--implementation", "triton"], "needs an NVIDIA GPU"),
        (["--implementation", "fastest"], "'fastest' is not one of"),
        (["--skip-threshold", "1"], "'1' must be a number above 0 and below 1"),
        (["--tiles", "64,64,4"], "'64,64,4' must be four integers"),
        (["--tiles", "64,48,4,2"], "block_kv=48 must be a power of two"),
        (["--activations", "nowhere.npz"], "nowhere.npz: No such file"),
    ],
)
def test_what_can_not_be_measured_is_refused_in_one_sentence(options, sentence, capsys):
    assert cli.main(["bench", "attention", *options]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "A-shape"])
def test_a_tile_of_the_mask_is_that_of_the_whole(kind, tiles):
    length = 300
    layout = constructed(KINDS[kind], length, tiles)
    layout = layout._replace(windows=layout.windows.at[0, 1].set(77))
    mask = meaning(layout, length, tiles)[0]
    for head in range(SMALL.num_heads):
        lists = SparseLayout(*(x[0, head] for x in layout))
        for tile in range(-(-length // tiles.block_q)):
            rows = slice(tile * tiles.block_q, (tile + 1) * tiles.block_q)
            found = oracle.tile_mask(lists, tile, length, tiles)
            np.testing.assert_array_equal(found[: mask[head, rows].shape[0]], mask[head, rows])
            assert not found[mask[head, rows].shape[0] :].any()


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_constructed_slashes_are_near_but_for_the_stated_share(tiles):
    length, wanted = 1024, SLASHES.pattern.slash_size
    layout = constructed(SMALL, length, tiles)
    mask = np.asarray(meaning(layout, length, tiles))[0]
    for head, columns in zip(mask, np.asarray(layout.columns)[0], strict=True):
        verticals = columns[columns < length]
        assert verticals.size == np.unique(verticals).size == SLASHES.pattern.vertical_size
        assert (verticals[:30] == np.arange(30)).all()
        slashes = [d for d in range(length - 1) if np.diagonal(head, -d).all()]
        assert set(range(round(0.9 * wanted))) <= set(slashes)
        assert max(slashes) > 4 * wanted


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_constructed_block_diagonals_are_as_many_as_the_estimate_keeps_and_aligned(tiles):
    layout = constructed(KINDS["block"], 4096, tiles)
    wanted = (SLASHES.pattern.slash_size + 2 * tiles.block_kv - 2) // tiles.block_kv
    used = np.asarray(layout.offsets)[0][:, : int(layout.offset_counts.max())]
    assert (used[used > -4096 - tiles.block_q] % tiles.block_kv == 0).all()
    extra = tiles.block_q // tiles.block_kv - 1  # rows of a tall tile reach further
    assert (np.asarray(layout.offset_counts) >= wanted).all()
    assert (np.asarray(layout.offset_counts) <= wanted + 2 * extra * wanted).all()


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_random_blocks_have_the_stated_density_and_hold_their_own_positions(tiles):
    length, case = 1024, KINDS["block-sparse"]
    layout = constructed(case, length, tiles)
    at, valid = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)
    np.testing.assert_allclose(density(layout, at, valid, length, tiles), 0.4, atol=0.06)
    mask = np.asarray(meaning(layout, length, tiles))[0]
    assert np.diagonal(mask, axis1=1, axis2=2).all()
    assert (mask[0] != mask[1]).any()
    keys = computed_keys(layout, at, valid, length, tiles)[0, 0]
    assert (keys == layout.block_counts[0, 0] * tiles.block_kv).all()


def test_random_activations_are_of_the_shape_and_kind_of_the_case(monkeypatch):
    monkeypatch.setattr(inputs, "_CHUNK", 64)
    case = dataclasses.replace(SMALL, dtype="bfloat16")
    q, k, v = inputs.random_activations(case, 301)
    assert (q.shape, k.shape, v.shape) == ((1, 301, 4, 16), (1, 301, 2, 16), (1, 301, 2, 16))
    assert {str(x.dtype) for x in (q, k, v)} == {"bfloat16"}
    assert abs(float(q.astype(jnp.float32).std()) - 1) < 0.05
    assert len(np.unique(np.asarray(q[0, :, 0, :8], np.float32), axis=0)) == 301
    assert not (k == v).all()


def test_gpu_cases_have_the_sizes_of_the_targets():
    found = {case.name: case for case in cases.GPU_CASES}
    sizes = {length: found["VS line"].sizes_at(length, TileConfig()) for length in found["VS line"].lengths}
    assert [s.pattern.slash_size for s in sizes.values()] == [600, 600, 2048, 6096, 6096, 6096]
    assert [s.local_share for s in sizes.values()] == [0.97, 0.97, 0.97, 0.98, 0.98, 0.98]
    assert found["VS block"].slash_granularity == "block"
    listed = found["block-sparse"]
    assert [listed.sizes_at(131072, tiles).pattern.num_blocks for tiles in TILES.values()] == [105, 105, 420]
    assert {(case.num_heads, case.dtype) for case in found.values()} == {(32, "bfloat16")}


def test_cases_are_chosen_by_their_names_or_parts_of_them_and_lengths_rise():
    def names(texts):
        return [case.name for case in cases.select_cases(cases.GPU_CASES, texts)]

    assert names(["VS line"]) == ["VS line"]
    assert names(["dense", "KV head"]) == ["dense", "VS line, 1 KV head", "VS line, 32 KV heads"]
    planned = cases.plan(cases.select_cases(cases.GPU_CASES, ["VS"]), [512, 256])
    assert [length for _, length in planned] == [256] * 7 + [512] * 7


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The script's folder of one layer's activations of a small random model."""
    folder = tmp_path_factory.mktemp("saved")
    model = write_model(folder / "model")
    save = runpy.run_path(str(ROOT / "benchmarks" / "save_activations.py"))
    (folder / "text").write_text("All the world's a stage, and all the men and women merely players. " * 9)
    arguments = {"model": model, "text": folder / "text", "tokens": 400, "layers": [1], "folder": folder}
    return save["save"](type("Arguments", (), arguments))[0]


@pytest.mark.usefixtures("short_check")
def test_lists_of_saved_activations_come_from_the_estimate(saved, monkeypatch):
    activations = inputs.read_activations(saved)
    assert [x.shape for x in activations] == [(1, 400, 4, 8), (1, 400, 2, 8), (1, 400, 2, 8)]
    bench = attention.Bench(activations=activations, repeats=1)
    planned = bench.plan(None, None)
    assert [(case.name, length) for case, length in planned] == [("VS line", 400), ("VS block", 400)]
    case = dataclasses.replace(planned[0][0], sizes=SMALL.sizes)
    monkeypatch.setattr(inputs, "constructed_layout", None)
    bench._check = lambda case: 0.0
    one = bench.measure(case, 400)
    assert (one["lists"], one["pattern"], one["num_heads"]) == ("activations", "VS(40, 70)", 4)
    with pytest.raises(ValueError, match="have 400 tokens, 401 were asked for"):
        bench.measure(case, 401)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"q": np.zeros((4, 2, 8))}, "it has q"),
        ({"q": np.zeros((4, 3, 8)), "k": np.zeros((4, 2, 8)), "v": np.zeros((4, 2, 8))}, "N a multiple of K"),
        ({"q": np.zeros((4, 2, 8)), "k": np.zeros((4, 2, 8)), "v": np.zeros((4, 2, 8))}, "float16 or float32"),
        ({"q": np.zeros((4, 8)), "k": np.zeros((4, 8)), "v": np.zeros((4, 8))}, "it has q float64"),
    ],
)
def test_files_that_hold_no_activations_are_refused(arrays, sentence, tmp_path):
    np.savez(tmp_path / "given.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        inputs.read_activations(tmp_path / "given.npz")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"must be a \.npz file"):
        inputs.read_activations(tmp_path / "text.npz")


def test_a_long_baseline_is_measured_once_for_all_cases_of_a_shape(monkeypatch):
    monkeypatch.setattr(attention, "BASELINE_ONCE_FROM", 300)
    bench, ran = attention.Bench(repeats=2), []
    calls = attention.Calls(kernel=lambda *_: ran.append("kernel"), layout=None, index=None, mass=None)

    def times(kind, length):
        ran.clear()
        return bench._times(KINDS[kind], length, (), calls, lambda: ran.append("baseline"))["baseline"]

    first = times("line", 300)
    assert ran == ["kernel", "baseline"] * 3  # one to warm up
    assert times("block", 300) == first
    assert ran == ["kernel"] * 3
    for other in (("dense", 300), ("line", 299), ("line", 299)):
        times(*other)
        assert ran == ["kernel", "baseline"] * 3


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


@pytest.mark.parametrize(("ms", "repeats", "called"), [(4.0, 2, 3), (0.01, 2, 50), (30.0, 2, 1), (4.0, 1, 1)])
def test_short_calls_are_timed_in_a_row_and_long_ones_alone(monkeypatch, ms, repeats, called):
    now, made = [0.0], []

    def call():
        made.append(now[0])
        now[0] += ms / 1e3

    monkeypatch.setattr(attention.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(attention, "WARM_SECONDS", 0.0)
    times = attention.timed({"call": (repeats, call)}, in_turn=False)["call"]
    assert times == pytest.approx([ms] * repeats)
    assert len(made) == 1 + (repeats > 1) + repeats * called

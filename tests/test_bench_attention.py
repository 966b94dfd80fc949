"""The attention suite: what it checks before it measures, records and refuses."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from bench_cases import KINDS, SMALL
from small_models import write_model

from minference_jax import cli, implementations
from minference_jax.bench import attention, cases, inputs, oracle, records

ROOT = Path(__file__).parent.parent
NEAREST = cases.CPU_CASES[1].name  # the least work
XLA = {entry.name: entry for entry in implementations.IMPLEMENTATIONS}["xla"]


@pytest.fixture
def short_check(monkeypatch):
    monkeypatch.setattr(attention, "CHECK_LENGTH", 256)


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
        (["--output", "/"], "/ is a folder: name a file"),
    ],
)
def test_what_can_not_be_measured_is_refused_in_one_sentence(options, sentence, capsys):
    assert cli.main(["bench", "attention", *options]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not said.out


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

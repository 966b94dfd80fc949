"""The prefill suite: what it records and refuses."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import oracle_implementation
from small_models import NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import AShape, VerticalSlash, cli, implementations, load, uniform_patterns, write_patterns
from minference_jax.bench import meters, prefill, prefill_parts, random_model, records, shapes
from minference_jax.cache import SnapKV, policy_of
from minference_jax.cli import bench_prefill_command
from minference_jax.convert.hf_config import read_config
from minference_jax.estimate import EstimateKernels
from minference_jax.generate import LanguageModel, programs
from minference_jax.generate.attend import choose_attend
from minference_jax.measure import DENSE, CallTimer, attention_of, timing
from minference_jax.models import from_parameters, parameters_of, quantize_linear
from minference_jax.patterns.published import PUBLISHED
from minference_jax.patterns.registry import choose_published
from minference_jax.tile_table import TileTable

LENGTH = 200
TINY = shapes.SHAPES["smollm2-135m"] | {
    "_name_or_path": "somebody/tiny",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
SLASHES = ["--attention", "vertical_slash", "--vertical-size", "30", "--slash-size", "50"]
A_SHAPE = ["--attention", "a_shape", "--sink-size", "8", "--window-size", "64"]
TIMES = ("ms", "compile_ms", "linear_ms", "cache_ms", "kernel_ms", "tokens_per_second", "host_peak_bytes")


def everything(q, k, v, layout, **where):
    """A sparse kernel that looks at no lists."""
    return oracle_implementation().dense(q, k, v, **where)


def mass_of_nothing(q, k, positions, *, scale):
    """Attention mass that is the same everywhere."""
    none = jnp.zeros((q.shape[0], q.shape[2], k.shape[1]))
    return none, none


def first_mask(scores, k):
    """The first k of all scores, not the largest."""
    return jnp.broadcast_to(jnp.arange(scores.shape[-1]) < k[..., None], scores.shape)


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    quick = oracle_implementation()._replace(sparse=everything)  # to compile, which is all that takes time here
    quick = quick._replace(estimate=EstimateKernels(mass_of_nothing, first_mask))
    with pytest.MonkeyPatch.context() as patch:
        for module in (implementations, timing):
            patch.setattr(module, "IMPLEMENTATIONS", (quick, *module.IMPLEMENTATIONS))
        patch.setitem(shapes.SHAPES, "tiny", TINY)
        yield


def bench(*options):
    return cli.main(["bench", "prefill", "--shape", "tiny", "--dtype", "float32", *options])


def subject(**given):
    config = read_config(TINY)
    how = {"dtype": "float32", "patterns": None, "tiles": TileTable()}
    return prefill.Subject("tiny", random_model.random_model(config, **how | given), 3, "a test's lists", "a pattern")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The records of vertical-slash heads on two of three layers, with all parts, as they were printed and appended."""
    output = tmp_path_factory.mktemp("results") / "folder" / "prefill.jsonl"
    options = ["--layers", "2", "--lengths", str(LENGTH), "--repeats", "2", "--output", str(output)]
    assert bench(*SLASHES, *options) == 0
    return output, records.read(output)


def test_each_attention_is_a_record_with_every_field(measured):
    dense, sparse = measured[1]
    assert tuple(json.loads(measured[0].read_text().splitlines()[0])) == records.FIELDS
    assert (dense["attention"], sparse["attention"], sparse["pattern"]) == ("dense", "vertical_slash", "VS(30, 50)")
    assert (dense["lists"], sparse["lists"]) == (None, "activations of random weights")
    assert (sparse["baseline"], sparse["baseline_ms"]) == (f"dense, {dense['implementation']}", dense["ms"])
    assert sparse["ratio"] == sparse["ms"] / dense["ms"]
    assert 0 < sparse["density"] < dense["density"] == 1
    for one in (dense, sparse):
        assert (one["suite"], one["case"], one["length"], one["dtype"]) == ("prefill", "tiny", LENGTH, "float32")
        assert one["ms_spread"][0] <= one["ms"] <= one["ms_spread"][1]
        assert one["tokens_per_second"] == pytest.approx(1e3 * LENGTH / one["ms"])
        assert (one["device"], one["jax"]) == (records.environment()["device"], jax.__version__)


def test_parts_are_measured_or_null(measured):
    dense, sparse = measured[1]
    for one in (dense, sparse):
        assert all(one[name] > 0 for name in TIMES)
    assert sparse["index_ms"] > 0
    assert sparse["estimate_ms"] > 0
    assert dense["index_ms"] is dense["estimate_ms"] is None
    assert dense["linear_ms"] == sparse["linear_ms"]
    assert dense["joules"] is dense["peak_bytes"] is None  # a CPU tells neither


def test_what_fewer_layers_stand_for_is_said_to_be_extrapolated(measured):
    for one in measured[1]:
        assert (one["layers"], one["model_layers"]) == (2, 3)
        assert one["extrapolated_ms"] == pytest.approx(one["ms"] * 3 / 2)


def test_records_are_appended_and_a_resumed_run_measures_what_is_missing(measured, monkeypatch, tmp_path, capsys):
    output = tmp_path / "prefill.jsonl"
    output.write_text(measured[0].read_text())
    asked = []
    monkeypatch.setattr(prefill.PrefillBench, "measure", lambda self, length: iter(asked.append(length) or ()))
    options = [*SLASHES, "--layers", "2", "--output", str(output), "--lengths", "300", str(LENGTH), "300"]
    assert bench(*options) == 0
    assert asked == [LENGTH, 300]  # the shortest first, each once
    asked.clear()
    assert bench(*options, "--resume") == 0
    assert asked == [300]
    asked.clear()
    assert bench(*options, "--resume", "--slash-granularity", "block") == 0
    assert asked == [LENGTH, 300]
    output.write_text(measured[0].read_text().splitlines()[1] + "\n")  # the sparse half of the pair
    asked.clear()
    assert bench(*options, "--resume") == 0
    assert asked == [LENGTH, 300]
    assert capsys.readouterr() == ("", "")


def test_what_does_not_fit_is_said_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    def read(self, tokens, *, attention, **options):
        if attention == "dense":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand pages more")
        return programs.PrefillResult(np.ones((1, 257)), None, np.ones((3, 1, 4)) / 4)

    def parts(*arguments):
        raise MemoryError("they do not fit")

    monkeypatch.setattr(prefill.LanguageModel, "prefill", read)
    monkeypatch.setattr(prefill, "prefill", lambda *arguments: read(None, None, attention="none"))
    monkeypatch.setattr(prefill, "time_parts", parts)
    with pytest.raises(SystemExit) as stop:
        bench(*A_SHAPE, "--implementation", "xla", "--lengths", "100", "--output", str(tmp_path / "out.jsonl"))
    said = capsys.readouterr()
    assert stop.value.code == 1
    first, second = said.err.splitlines()
    assert first == (
        "minference-jax: error: prefill with dense attention, tiny, 3 layers, 100 tokens: it needs more memory "
        "than is free"
    )
    assert second.endswith("the parts of prefill with a_shape attention, tiny, 3 layers, 100 tokens: they do not fit")
    (sparse,) = map(json.loads, said.out.splitlines())
    assert (sparse["attention"], sparse["density"], sparse["kernel_ms"]) == ("a_shape", 0.25, None)
    assert sparse["baseline"] is sparse["baseline_ms"] is sparse["ratio"] is None
    assert records.read(tmp_path / "out.jsonl") == [sparse]


def test_parts_are_timed_on_the_arrays_of_the_prefill_in_chunks_too(monkeypatch):
    model = subject().model
    tokens = np.random.default_rng(1).integers(0, 257, 300)
    seen, run = [], prefill_parts._dense

    def look(q, k, v, **how):
        seen.append((np.asarray(k), int(how["q_offset"][0]), int(how["kv_len"][0]), q.shape[1]))
        return run(q, k, v, **how)

    monkeypatch.setattr(prefill_parts, "_dense", look)
    attend, _ = choose_attend(
        "dense",
        None,
        patterns=model.patterns,
        slash_granularity="line",
        implementation="oracle",
        tiles=None,
        whole_prompt=False,
    )
    parts = prefill_parts.time_parts(model, tokens, attend, None, chunk_size=128)
    assert parts.keys() == set(prefill_parts.PARTS)
    assert parts["index"] is parts["mass"] is None
    assert [each[1:] for each in seen[1:]] == [(n, min(n + 128, 300), 128) for n in (0, 128, 256) for _ in range(3)]
    keys = model.prefill(tokens, attention="dense", implementation="oracle", chunk_size=128).cache.k
    for layer, (k, _, length, _) in enumerate(seen[-3:]):
        np.testing.assert_allclose(k[:, :length], keys[layer, :, :length], atol=1e-5)


def test_nothing_is_compiled_in_a_timed_part_of_a_model_that_was_loaded_to_a_device():
    given = subject().model.model
    parameters = jax.device_put(parameters_of(given), jax.devices()[0])  # committed, as `load` puts them
    model = LanguageModel(from_parameters(given.config, parameters))
    attend, _ = model.choose(128, "dense", None, "line", None)
    for run, chunk_size in ((prefill_parts._write, None), (prefill_parts._append, 128)):
        run.clear_cache()
        prefill_parts.time_parts(model, np.arange(200), attend, None, chunk_size)
        assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [("int8", None), ("int8", 128), ("fp8", 128), ("snapkv", None), ("streaming_llm", None), ("host", None)],
)
def test_the_part_of_the_cache_is_what_its_policy_keeps(monkeypatch, name, chunk_size):
    model, tokens = subject().model, np.random.default_rng(1).integers(0, 257, 200)
    attend, _ = model.choose(256, "dense", None, "line", None)
    policy = SnapKV(capacity=40, window_size=8) if name == "snapkv" else policy_of(name)  # one that leaves tokens out
    walks, times = [], prefill_parts._Walk.times
    monkeypatch.setattr(prefill_parts._Walk, "times", lambda walk: walks.append(walk) or times(walk))
    parts = prefill_parts.time_parts(model, tokens, attend, None, chunk_size, policy)
    assert parts["cache"] > 0
    if name == "host":  # it is copied, and nothing of it stays
        assert walks[0]._held is None
        return
    stored = model.prefill(tokens, attention="dense", chunk_size=chunk_size, kv_cache=policy).cache
    kept = jax.tree.leaves(walks[0]._held._replace(length=stored.length) if chunk_size else walks[0]._held)
    expected = jax.tree.leaves(stored)[: len(kept)]
    assert [(x.shape, x.dtype) for x in kept] == [(x.shape, x.dtype) for x in expected]
    for x, other in zip(kept, expected, strict=True):  # what goes into the first layer is the same
        atol = 1e-5 if jnp.issubdtype(x.dtype, jnp.floating) else 1.01
        np.testing.assert_allclose(*(np.asarray(each[0], np.float32) for each in (x, other)), rtol=1e-5, atol=atol)


def test_random_weights_are_those_that_the_models_begin_with():
    parameters = parameters_of(subject().model.model)
    assert {str(array.dtype) for array in parameters.values()} == {"float32"}
    for name, array in parameters.items():
        values = np.asarray(array, np.float32)
        if name.endswith(".scale"):
            assert (values == 1).all()
        else:
            assert abs(values.std() / 0.02 - 1) < 0.05
            assert len(np.unique(values.reshape(-1, values.shape[-1]), axis=0)) == values.size // values.shape[-1]


def test_8_bit_linear_layers_are_those_of_the_same_random_weights_and_another_measurement():
    exact, fast = subject(), subject(linear="fp8")
    expected = parameters_of(quantize_linear(exact.model.model))
    for name, array in parameters_of(fast.model.model).items():
        np.testing.assert_array_equal(array, expected[name])
    mine, theirs = (prefill.PrefillBench(one, attention_of("a_shape", {})) for one in (fast, exact))
    there = [records.record(**mine._described(one, 200)) for one in (DENSE, mine._sparse)]
    assert [one["linear"] for one in there] == ["fp8", "fp8"]
    assert mine.is_measured(200, there)
    assert not theirs.is_measured(200, there)


@pytest.mark.parametrize("linear", [None, "fp8"])
def test_first_layers_are_those_of_the_whole_model(linear):
    whole = subject(linear=linear).model
    first = random_model.first_layers(whole, 2)
    assert (first.config.num_layers, first.patterns.num_layers) == (2, 2)
    kept, given = parameters_of(first.model), parameters_of(whole.model)
    assert kept.keys() == given.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(array, given[name][:2] if name.startswith("layers.") else given[name])


@pytest.fixture
def chosen(monkeypatch):
    """Gives the subject that the command makes of its options, and the options of the bench."""
    made = []
    monkeypatch.setattr(
        bench_prefill_command,
        "PrefillBench",
        lambda subject, attention, **given: made.append((subject, given)) or NothingToDo,
    )

    def choose(*options):
        assert cli.main(["bench", "prefill", *options]) == 0
        return made.pop()

    return choose


class NothingToDo:
    """A bench with nothing to do."""

    plan = staticmethod(lambda lengths: [])


def test_a_pattern_file_is_of_the_whole_model_and_its_first_layers_are_used(chosen, monkeypatch, tmp_path, capsys):
    window, slashes = AShape(sink_size=8, window_size=16), VerticalSlash(vertical_size=30, slash_size=50)
    whole = replace(uniform_patterns(3, 4), layers=((window,) * 4, (slashes,) * 4, (window,) * 4))
    write_patterns(whole, tmp_path / "found.json")
    monkeypatch.setattr(bench_prefill_command, "random_model", lambda config, **how: (config, how))
    found, _ = chosen("--shape", "tiny", "--layers", "2", "--pattern", str(tmp_path / "found.json"))
    config, how = found.model
    assert (found.pattern, found.model_layers, config.num_layers, how["dtype"]) == ("found.json", 3, 2, "bfloat16")
    assert how["patterns"].layers == whole.layers[:2]
    write_patterns(uniform_patterns(2, 4), tmp_path / "other.json")
    assert bench("--pattern", str(tmp_path / "other.json")) == 2
    assert "do not fit a model of 3 layers" in capsys.readouterr().err


def test_a_model_of_its_own_weights_is_measured_with_its_own_patterns(chosen, monkeypatch, tmp_path):
    folder = write_model(tmp_path / "hf", tokenizer=False)
    monkeypatch.setattr(bench_prefill_command, "load_model", lambda arguments: load(arguments.model))
    found, given = chosen("--model", str(folder), "--layers", "1", "--chunk-size", "128")
    assert (found.name, found.model_layers, found.model.config.num_layers) == ("hf", NUM_LAYERS, 1)
    assert found.model.patterns.num_heads == NUM_HEADS
    assert found.lists == "activations of a random prompt"
    assert (given["chunk_size"], given["repeats"], given["has_parts"]) == (128, 3, True)


@pytest.mark.parametrize("name", [name for name in shapes.SHAPES if name != "smollm2-135m"])
def test_shapes_are_configs_of_models_with_a_published_pattern_file(name):
    fields = shapes.SHAPES[name]
    config = read_config(fields)
    (row,) = [row for row in PUBLISHED if row.file == choose_published(fields["_name_or_path"], fields).file]
    assert (row.num_layers, row.num_heads, row.vocab_size) == (config.num_layers, config.num_heads, config.vocab_size)
    assert fields["_name_or_path"] in row.models[config.max_position_embeddings]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shape", "llama9"], "invalid choice: 'llama9'"),
        (["--lengths", "513"], "--lengths 513 is more than the 512 tokens that the model reads"),
        (["--lengths", "0"], "'0' must be an integer of at least 1"),
        (["--layers", "4"], "--layers 4 is more than the 3 layers of the model"),
        (["--chunk-size", "100"], "chunk_size=100 must be None or a multiple of 128"),
        (["--implementation", "triton"], "needs an NVIDIA GPU"),
        (["--implementation", "fastest"], "'fastest' is not one of"),
        (["--attention", "dense"], "invalid choice: 'dense'"),
        ([*A_SHAPE, "--pattern", "p.json"], "--pattern goes with --attention minference"),
        (["--pattern", "nowhere.json"], "nowhere.json: No such file"),
        (["--resume"], "--resume needs --output"),
        (["--output", "/"], "/ is a folder: name a file"),
        (["--output", __file__, "--resume"], "line 1 is no record"),
        (["--model", "nowhere"], "not allowed with argument"),
    ],
)
def test_what_can_not_be_measured_is_refused_in_one_sentence(options, sentence, capsys):
    assert bench(*options) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_without_lengths_those_that_the_model_reads_are_measured():
    bench = prefill.PrefillBench(subject(), attention_of("a_shape"))
    assert bench.plan(None) == [512]
    assert bench.plan([300, 200, 300]) == [200, 300]
    with pytest.raises(ValueError, match="600 tokens was asked for, tiny can read 512"):
        bench.plan([200, 600])
    with pytest.raises(ValueError, match="can't be compared with dense"):
        prefill.PrefillBench(subject(), attention_of("dense"))


def side(seconds, joules):
    timer = CallTimer(lambda name: np.zeros(1))
    timer.seconds = list(seconds)
    counter = iter(range(0, 10**6, 60))
    meter = meters.Meter(lambda: float(next(counter)) if joules else None)
    meter.joules = [90.0, 110.0] if joules else [None, None]
    return prefill._Side("dense", timer, meter, 2, {})


def test_joules_are_those_of_one_prefill_and_short_ones_are_counted_in_a_row(monkeypatch):
    monkeypatch.setattr(prefill, "LEAST_SECONDS", 0.01)
    long, short, none = side([0.02, 0.03], True), side([0.001, 0.03], True), side([0.02], False)
    for one in (long, short, none):
        prefill._add_joules(one)
    assert long.facts["joules"] == 100
    assert 0 < short.facts["joules"] < 60  # 60 for all of the row
    assert short.timer.seconds == [0.001, 0.03]
    assert "joules" not in none.facts


def test_auto_is_measured_as_what_it_stands_for():
    dense, auto = prefill.PrefillBench(subject(), attention_of("auto"), repeats=1).measure(100)
    assert (auto["attention"], auto["implementation"], auto["tiles"]) == ("auto", "auto", None)
    assert auto["density"] == 1.0
    assert auto["kernel_ms"] > 0
    assert auto["index_ms"] is None
    assert auto["ratio"] == auto["ms"] / dense["ms"]


def test_an_answer_is_timed_behind_each_prefill_and_needs_room():
    bench = prefill.PrefillBench(subject(), attention_of("a_shape"), repeats=1, has_parts=False, max_new_tokens=3)
    assert bench.plan(None) == [507]
    with pytest.raises(ValueError, match="508 tokens was asked for, tiny can read 507"):
        bench.plan([508])
    dense, sparse = bench.measure(100)
    assert dense["decode_ms"] > 0
    assert sparse["decode_ms"] > 0

"""The command line's convert and export: reports, throughput, refusals, and Ctrl-C."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from comparing import names_in
from family_folders import CASES, hf_weights, parameters, write_family
from safetensors.numpy import load_file, save_file
from small_models import NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import Dense, uniform_patterns, write_patterns
from minference_jax.cli import convert_command, export_command, main
from minference_jax.cli.progress import ByteBars, Throughput
from minference_jax.convert import store
from minference_jax.convert.checkpoint import load_parameters
from minference_jax.convert.weight_source import ALREADY_WRITTEN

RATE = r"\d+\.\d MB in \d+\.\d s, \d+ MB/s\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command line in a folder of its own; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def runs(*words):
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return runs


def test_converted_model_is_read_with_its_patterns(run, model, tmp_path):
    write_patterns(uniform_patterns(NUM_LAYERS, NUM_HEADS, Dense()), tmp_path / "fits.json")
    code, out, err = run("convert", model, "ours", "--dtype", "bfloat16", "--patterns", "fits.json")
    assert (code, err) == (0, "")
    prompt = ("--prompt", "x" * 40, "--max-new-tokens", 2, "--repeats", 1, "--json")
    code, out, _ = run("prefill", *prompt, "--model", "ours")
    facts = json.loads(out)
    assert (facts["dtype"], facts["pattern"]) == ("bfloat16", "ours/patterns.json")


def test_conversion_and_export_say_how_much_and_how_fast(run, model, tmp_path):
    code, out, err = run("convert", model, "ours")
    assert (code, err) == (0, "")
    assert re.fullmatch(re.escape(f"{model} is now the checkpoint {tmp_path / 'ours'}: ") + RATE, out)
    code, out, err = run("export", "ours", "theirs")
    assert (code, err) == (0, "")
    assert re.fullmatch(re.escape(f"ours is now the Hugging Face folder {tmp_path / 'theirs'}: ") + RATE, out)
    expected = load_file(model / "model.safetensors")
    exported = load_file(tmp_path / "theirs" / "model.safetensors")
    assert exported.keys() == expected.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_throughput_counts_what_was_written_by_this_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("minference_jax.cli.progress.time.monotonic", lambda: now[0])
    progress = Throughput(ByteBars(False))
    for done, name in ((1e9, ALREADY_WRITTEN), (1.5e9, "a"), (3e9, "b")):
        progress(int(done), int(3e9), name)
    now[0] = 104.0
    assert str(progress) == "2000.0 MB in 4.0 s, 500 MB/s, 1000.0 MB were written before"


def test_disk_without_room_is_one_sentence_and_the_same_command_goes_on(run, model, tmp_path, monkeypatch):
    write = store._save

    def full(folder, tensors):
        if folder.name != "outside_layers":
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand pages more")
        write(folder, tensors)

    monkeypatch.setattr(store, "_save", full)
    code, out, err = run("convert", model, "ours")
    assert (code, out) == (2, "")
    assert err.endswith("can't be written: RESOURCE_EXHAUSTED: No space left on device\n")
    assert err.count("\n") == 1
    monkeypatch.setattr(store, "_save", write)
    code, out, _ = run("convert", model, "ours")
    assert code == 0
    assert re.search(r"MB/s, \d+\.\d MB were written before\n", out)


def test_export_takes_a_dtype_and_draws_bars_where_asked(run, model, tmp_path):
    run("convert", model, "ours")
    code, _, err = run("export", "ours", "theirs", "--dtype", "float16", "--progress")
    assert code == 0
    assert "weights: 100%" in err
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {array.dtype.name for array in weights.values()} == {"float16"}
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("options", [["ours"], []])
def test_dry_run_prints_every_parameter_and_writes_nothing(run, tmp_path, options):
    fields = CASES["phi3"]
    write_family(tmp_path / "hf", fields)
    code, out, err = run("convert", "hf", *options, "--dry-run")
    assert (code, err) == (0, "")
    assert names_in(tmp_path) == ["hf"]
    lines = out.splitlines()
    assert lines[0] == "hf: Phi3, 3 layers, 4 heads over 2 KV heads of 8"
    assert lines[1] == "up to 128 tokens, vocabulary of 61, dtype float32"
    rows = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in lines[4:-1]}
    assert {name: row[:2] for name, row in rows.items()} == {
        name: [str(list(array.shape)), f"{array.nbytes:,}"] for name, array in parameters(fields).items()
    }
    assert rows["layers.attention.v_proj.kernel"][2] == "model.layers.{}.self_attn.qkv_proj.weight rows 48 to 63"
    assert rows["lm_head.kernel"][2] == "lm_head.weight"
    assert lines[-1].split() == ["all", f"{sum(array.nbytes for array in hf_weights(fields).values()):,}"]
    assert run("convert", "hf", "--dry-run", "--dtype", "bfloat16")[1].count("dtype bfloat16") == 1


def test_dry_run_lists_all_that_would_be_refused_and_writes_nothing(run, model, tmp_path):
    source = write_model(tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights | {"model.extra": np.zeros(2, np.float32)}, source / "model.safetensors")
    (source / "tokenizer.json").write_text("{}")
    write_patterns(uniform_patterns(NUM_LAYERS + 1, NUM_HEADS), tmp_path / "other.json")
    (tmp_path / "there").mkdir()
    code, out, err = run("convert", "hf", "there", "--dry-run", "--patterns", "other.json")
    assert code == 2
    assert "embed.embedding" in out
    assert err.startswith("minference-jax: error: ")
    for part in (
        "there already exists",
        "unmatched: model.extra",
        "missing: model.norm.weight",
        "the tokenizer of hf can't be loaded",
        "do not fit a model of 2 layers of 4 heads",
    ):
        assert part in err
    assert "Traceback" not in err
    assert (names_in(tmp_path), names_in(tmp_path / "there")) == (["hf", "other.json", "there"], [])


def test_dry_run_of_a_config_that_is_refused_says_that_nothing_would_be_written(run, tmp_path):
    source = write_family(tmp_path / "hf", CASES["llama"])
    (source / "config.json").write_text(json.dumps(CASES["llama"] | {"hidden_act": "gelu", "surprise": 1}))
    code, out, err = run("convert", "hf", "--dry-run")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "hidden_act='gelu' is not supported" in err
    assert "surprise=1 is not a field this converter knows" in err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("convert MODEL", "convert needs a DESTINATION, the new checkpoint folder, or --dry-run"),
        ("convert MODEL there", "there already exists; choose another or ask to overwrite it (--overwrite)"),
        ("convert MODEL there --overwrite", "there is not a minference-jax checkpoint, so it is not overwritten"),
        ("convert nowhere --dry-run", "nowhere does not exist, and is no Hugging Face id"),
        ("convert MODEL new --patterns absent.json", "absent.json: No such file or directory"),
        ("convert MODEL --dry-run --patterns absent.json", "absent.json"),
        ("export MODEL new", "is not a minference-jax checkpoint: convert the model first"),
        ("export nowhere new", "nowhere is not a minference-jax checkpoint"),
        ("export MODEL", "the following arguments are required: DESTINATION"),
        ("export MODEL new --dtype int8", "invalid choice: 'int8'"),
    ],
)
def test_users_mistake_is_one_sentence_and_exit_code_2(run, model, tmp_path, command, sentence):
    (tmp_path / "there").mkdir()
    code, _, err = run(*(model if word == "MODEL" else word for word in command.split()))
    assert code == 2
    assert err.startswith("minference-jax: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert names_in(tmp_path) == ["there"]


# Converts with a group for every layer, and presses Ctrl-C when 13 of 20 tensors are done (2, then 9 in each layer).
INTERRUPTED = """
import os, signal, sys
from minference_jax.cli import main
from minference_jax.cli.progress import ByteBars
from minference_jax.convert import checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored
checkpoint.GROUP_BYTES = 1
calls = []
def pressed(self, *call):
    calls.append(call)
    if len(calls) == 13:
        os.kill(os.getpid(), signal.SIGINT)
ByteBars.__call__ = pressed
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_says_that_the_same_command_goes_on_and_it_does(run, model, tmp_path, monkeypatch, overwrite):
    command = ["convert", str(model), str(tmp_path / "ours")]
    if overwrite:
        assert run(*command, "--dtype", "float16")[0] == 0
        command.append("--overwrite")
    code = [sys.executable, "-P", "-c", INTERRUPTED]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([*code, *command], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted: the same command goes on where this one stopped\n"
    assert [name for name in names_in(tmp_path) if not name.startswith(".ours.partial-")] == ["ours"] * overwrite
    assert len(names_in(tmp_path)) == 1 + overwrite
    calls = []
    monkeypatch.setattr("minference_jax.convert.checkpoint.GROUP_BYTES", 1)
    monkeypatch.setattr(ByteBars, "__call__", lambda self, *call: calls.append(call))
    code, _, err = run(*command)
    assert (code, err) == (0, "")
    assert [name for *_, name in calls].count(ALREADY_WRITTEN) == 2
    assert len(calls) == 2 + 9  # the last layer only
    assert names_in(tmp_path) == ["ours"]
    ours, theirs = load_parameters(tmp_path / "ours")[1], load_parameters(model)[1]
    for name, array in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(array), err_msg=name)


def test_interrupt_ends_in_one_sentence(run, model, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_command, "convert_model", interrupted)
    monkeypatch.setattr(export_command, "export_model", interrupted)
    sentence = "interrupted: the same command goes on where this one stopped\n"
    assert run("convert", model, "there") == (130, "", sentence)
    assert run("export", model, "there") == (130, "", "interrupted: nothing was written\n")

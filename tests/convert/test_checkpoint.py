"""Our checkpoint folder: complete or not there, the same parameters as its source."""

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from comparing import assert_same, names_in

from minference_jax.convert import checkpoint, placement
from minference_jax.convert.aside import publish, written_aside
from minference_jax.convert.checkpoint import (
    checkpoint_patterns,
    convert_model,
    is_checkpoint,
    load_config,
    load_parameters,
    load_stop_tokens,
    load_tokenizer,
)
from minference_jax.convert.hf_folder import HuggingFaceFolder
from minference_jax.convert.hf_weights import WeightError
from minference_jax.convert.store import TensorStore
from minference_jax.patterns import Dense, read_patterns, uniform_patterns, write_patterns


@pytest.fixture
def source(make, tmp_path):
    return make.folder(tmp_path / "hf")


@pytest.fixture
def converted(source, tmp_path):
    return convert_model(source, tmp_path / "out" / "checkpoint")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["folder", "sharded", "gguf"])
def test_checkpoint_holds_what_its_source_holds(make, tmp_path, kind, dtype):
    if kind == "gguf":
        path = make.gguf(tmp_path / "m.gguf")
    else:
        path = make.folder(tmp_path / "hf", shards=2 if kind == "sharded" else 0)
    destination = convert_model(path, tmp_path / "checkpoint", dtype=dtype)
    config, parameters = load_parameters(destination)
    direct_config, direct = load_parameters(path, dtype=dtype)
    assert config == direct_config == load_config(destination)
    assert_same(parameters, direct)
    assert next(iter(parameters.values())).dtype == dtype


def test_own_dtype_is_kept_and_can_be_changed_while_loading(make, tmp_path):
    path = make.folder(tmp_path / "hf", dtype=make.BF16)
    destination = convert_model(path, tmp_path / "checkpoint")
    assert json.loads((destination / "minference-jax.json").read_text())["dtype"] == "bfloat16"
    assert_same(load_parameters(destination)[1], load_parameters(path)[1])
    assert_same(load_parameters(destination, dtype="float32")[1], load_parameters(path, dtype="float32")[1])


def test_tokenizer_and_stop_tokens_come_along(source, converted, make, tmp_path):
    text = "some text"
    assert load_tokenizer(converted)(text)["input_ids"] == load_tokenizer(source)(text)["input_ids"]
    assert load_stop_tokens(converted) == (2,)
    gguf = make.gguf(tmp_path / "m.gguf")
    from_gguf = convert_model(gguf, tmp_path / "from_gguf")
    ours, theirs = load_tokenizer(from_gguf), load_tokenizer(gguf)
    assert ours("#$%")["input_ids"] == theirs("#$%")["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.chat_template) == (1, 2, theirs.chat_template)


def test_checkpoint_does_not_need_its_source(source, converted):
    before = load_parameters(converted)[1]
    shutil.rmtree(source)
    moved = converted.rename(converted.parent / "moved")
    assert_same(load_parameters(moved)[1], before)


def test_model_without_tokenizer_converts_and_says_so_when_asked_for_one(make, tmp_path):
    destination = convert_model(make.folder(tmp_path / "hf", tokenizer=False), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(destination)


def test_progress_counts_every_byte_once(source, tmp_path):
    calls = []
    convert_model(source, tmp_path / "checkpoint", dtype="bfloat16", progress=lambda *call: calls.append(call))
    done, totals, names = zip(*calls, strict=True)
    parameters = load_parameters(source, dtype="bfloat16")[1]
    assert set(totals) == {sum(array.nbytes for array in parameters.values())}
    assert list(done) == sorted(done)
    assert done[-1] == totals[0]
    assert len(set(names)) == len(names) == 30
    for path in (source, tmp_path / "checkpoint"):
        calls.clear()
        load_parameters(path, dtype="bfloat16", progress=lambda *call: calls.append(call))
        assert calls[-1][:2] == (totals[0], totals[0])
        assert {name for *_, name in calls} == parameters.keys()


def test_conversion_prints_nothing(make, source, tmp_path):
    make.gguf(tmp_path / "m.gguf")
    code = """
import sys
from minference_jax.convert.checkpoint import convert_model, load_parameters, load_tokenizer
for source in sys.argv[1:]:
    convert_model(source, source + "-checkpoint")
    load_parameters(source + "-checkpoint")
    load_tokenizer(source)
"""
    command = [sys.executable, "-P", "-c", code, str(source), str(tmp_path / "m.gguf")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("", "")


class Watched:
    """Counts arrays that were read and are still in memory, and waits for those that other threads let go of."""

    def __init__(self, most: int):
        self.most, self.earlier = most, []

    def before(self):
        for _ in range(1000):
            if sum(reference() is not None for reference in self.earlier) <= self.most:
                return
            time.sleep(0.01)
        raise AssertionError(f"more than {self.most} arrays that were read earlier are still in memory")

    def after(self, array):
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        self.earlier.append(weakref.ref(owner))


def test_one_tensor_is_in_memory_at_a_time_while_converting(source, tmp_path, monkeypatch):
    watched, read = Watched(0), HuggingFaceFolder.read

    def read_watched(self, name, start=0, stop=None):
        watched.before()
        array = read(self, name, start, stop)
        watched.after(array)
        return array

    monkeypatch.setattr(HuggingFaceFolder, "read", read_watched)
    convert_model(source, tmp_path / "checkpoint")
    assert len(watched.earlier) == 30


def test_loading_a_folder_takes_two_parts_of_host_memory(make, tmp_path, monkeypatch):
    """Arrays on a device are not traced; what is read from the files is."""
    path = make.folder(tmp_path / "hf", vocab_size=2**15)
    monkeypatch.setattr(placement, "PART_BYTES", 2**18)
    load_parameters(path)  # imports and caches
    tracemalloc.start()
    _, parameters = load_parameters(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2**18 < peak < 2 * 2**18 + 2**20 < max(array.nbytes for array in parameters.values()) / 2


def test_loading_a_checkpoint_takes_two_tensors_of_host_memory(source, converted, monkeypatch):
    monkeypatch.setattr(placement, "_READ_AT_ONCE", 1)
    watched, read = Watched(2), TensorStore.read

    def read_watched(self, keys):
        watched.before()
        tensors = read(self, keys)
        for array in tensors.values():
            watched.after(array)
        return tensors

    monkeypatch.setattr(TensorStore, "read", read_watched)
    assert_same(load_parameters(converted)[1], load_parameters(source)[1])
    assert len(watched.earlier) == 30


def test_refused_conversion_leaves_nothing(source, tmp_path):
    def progress(done, total, name):
        if done > total // 2:
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        convert_model(source, tmp_path / "out" / "checkpoint", progress=progress)
    assert names_in(tmp_path / "out") == []


def test_overwriting_leaves_alone_what_became_something_else_in_the_meantime(source, converted):
    def progress(done, total, name):
        (converted / checkpoint.MANIFEST_FILE).unlink(missing_ok=True)
        (converted / "thesis.txt").write_text("years of work")

    with pytest.raises(ValueError, match="appeared during the conversion"):
        convert_model(source, converted, overwrite=True, progress=progress)
    assert (converted / "thesis.txt").read_text() == "years of work"


def test_stop_tokens_come_along_without_a_tokenizer(make, tmp_path):
    source = make.folder(tmp_path / "hf", tokenizer=False)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load_stop_tokens(convert_model(source, tmp_path / "checkpoint")) == load_stop_tokens(source) == (5, 6)


def test_numbers_that_overflow_are_refused_beside_ones_that_are_infinite(make, tmp_path):
    weights = make.weights(make.CONFIG)
    weights["model.norm.weight"][:2] = [np.inf, 1e6]
    source = make.folder(tmp_path / "hf", weights=weights)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds 1e\+06, which float16 can't"):
        convert_model(source, tmp_path / "checkpoint", dtype="float16")
    with pytest.raises(ValueError, match=r"final_norm\.scale holds 1e\+06, which float16 can't"):
        load_parameters(source, dtype="float16")


def test_existing_destination_is_refused(source, converted):
    before = load_parameters(converted)[1]
    with pytest.raises(ValueError, match="already exists"):
        convert_model(source, converted)
    assert_same(load_parameters(converted)[1], before)


def test_overwriting_replaces_once_the_new_one_is_complete(make, source, converted, tmp_path):
    before = load_parameters(converted)[1]
    broken = make.folder(tmp_path / "broken", hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act"):
        convert_model(broken, converted, overwrite=True)
    seen = []
    convert_model(
        source,
        converted,
        overwrite=True,
        dtype="bfloat16",
        progress=lambda *call: seen.append(is_checkpoint(converted)) if not seen else None,
    )
    assert seen == [True]
    assert_same(load_parameters(converted)[1], load_parameters(source, dtype="bfloat16")[1])
    assert before["embed.embedding"].dtype == "float32"
    assert names_in(converted.parent) == ["checkpoint"]


def test_overwriting_anything_but_a_checkpoint_is_refused(source, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(ValueError, match="not a minference-jax checkpoint, so it is not overwritten"):
            convert_model(source, tmp_path / name, overwrite=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_first_of_two_conversions_wins(source, tmp_path):
    destination = tmp_path / "out" / "checkpoint"
    started = []

    def progress(*call):
        if not started:
            started.append(convert_model(source, destination))

    with pytest.raises(ValueError, match="appeared during the conversion"):
        convert_model(source, destination, dtype="bfloat16", progress=progress)
    assert_same(load_parameters(destination)[1], load_parameters(source)[1])
    assert names_in(destination.parent) == ["checkpoint"]


def test_replaced_folder_outlives_its_replacement(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with written_aside(tmp_path / "a") as folder:
        (folder / "new").touch()
        with pytest.raises(FileExistsError):
            publish(folder, tmp_path / "a")
        publish(folder, tmp_path / "a", replaces=Path.is_dir)
    assert names_in(tmp_path / "a") == ["new"]
    assert names_in(tmp_path) == ["a"]


def test_pattern_file_is_stored_and_found(source, tmp_path):
    patterns = tmp_path / "p.json"
    write_patterns(uniform_patterns(3, 4, Dense()), patterns)
    destination = convert_model(source, tmp_path / "checkpoint", patterns=patterns)
    found = checkpoint_patterns(destination)
    assert found == destination / "patterns.json"
    assert read_patterns(found).layers == uniform_patterns(3, 4, Dense()).layers


def test_pattern_file_of_another_model_is_refused(source, tmp_path):
    patterns = tmp_path / "p.json"
    write_patterns(uniform_patterns(3, 5, Dense()), patterns)
    with pytest.raises(ValueError, match="5"):
        convert_model(source, tmp_path / "checkpoint", patterns=patterns)
    assert not (tmp_path / "checkpoint").exists()


def test_no_patterns_where_there_are_none(source, converted):
    assert checkpoint_patterns(converted) is None
    assert checkpoint_patterns(source) is None
    assert checkpoint_patterns("organisation/name") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this release reads 'minference-jax/checkpoint' version 1"),
        ({"format": "other"}, "says format 'other'"),
        ({"dtype": "int8"}, "says dtype 'int8'"),
    ],
)
def test_checkpoint_of_another_format_is_refused(converted, change, message):
    manifest = converted / "minference-jax.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(ValueError, match="minference-jax.json") as error:  # noqa: RUF043
        load_parameters(converted)
    assert message in str(error.value)


def test_checkpoint_whose_weights_are_damaged_is_refused(converted):
    files = [path for path in (converted / "weights").rglob("*") if path.is_file() and path.stat().st_size > 1500]
    assert files
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:200]), os.unlink):
        kept = {path: path.read_bytes() for path in files}
        for path in files:
            damage(path)
        with pytest.raises(ValueError, match="damaged"):
            load_parameters(converted)
        for path, content in kept.items():
            path.write_bytes(content)
    load_parameters(converted)
    shutil.rmtree(converted / "weights")
    with pytest.raises(ValueError, match="damaged"):
        load_parameters(converted)


def test_checkpoint_whose_config_is_another_lists_what_does_not_fit(converted):
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "intermediate_size": 32}))
    with pytest.raises(WeightError) as error:
        load_parameters(converted)
    assert "layers.3.mlp.up_proj.kernel" in error.value.missing
    assert error.value.misshapen["layers.0.mlp.up_proj.kernel"] == ((32, 64), (32, 32))


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/no/such/place", "http://x/y"])
def test_source_that_is_nothing_is_refused_in_one_sentence(name):
    with pytest.raises(ValueError, match="does not exist, and is no Hugging Face id"):
        load_parameters(name)


def test_source_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a model"):
        load_parameters(tmp_path / "model.bin")


def test_hub_id_is_resolved_to_a_snapshot_and_a_local_path_wins(source, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, *, allow_patterns, tqdm_class, local_files_only):
        assert not local_files_only
        asked.append((name, allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert_same(load_parameters("some/model")[1], load_parameters(source)[1])
    assert load_tokenizer("some/model").eos_token_id == 2
    (weights, small) = asked
    assert "model.safetensors" in weights[1]
    assert not any("safetensors" in name for name in small[1])
    assert not any(name.endswith((".bin", ".pt", ".py")) or name == "*" for name in weights[1])
    shutil.copytree(source, tmp_path / "some" / "model")
    load_config("some/model")
    assert len(asked) == 2


def test_hub_out_of_reach_is_one_sentence(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(*args, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="some/model is not a local path and the Hugging Face hub can't be reached"):
        load_parameters("some/model")


def test_conversion_holds_no_lock_on_its_source(source, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(HuggingFaceFolder, "close", lambda self: closed.append(self.name))
    convert_model(source, tmp_path / "checkpoint")
    load_parameters(source)
    assert closed == [str(source)] * 2
    assert checkpoint.MANIFEST_FILE in names_in(tmp_path / "checkpoint")

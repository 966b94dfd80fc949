"""Conversions that were killed or interrupted: nothing of them loads, and the same one goes on where they stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from comparing import assert_same, names_in

from minference_jax.convert import checkpoint
from minference_jax.convert.aside import publish, written_aside
from minference_jax.convert.checkpoint import convert_model, is_checkpoint, load_parameters
from minference_jax.convert.hf_folder import HuggingFaceFolder
from minference_jax.convert.store import LazyTensor, TensorStore, save_tensors
from minference_jax.convert.weight_source import ALREADY_WRITTEN
from minference_jax.patterns import Dense, uniform_patterns, write_patterns

GROUPS = ["layers_0000_to_0000", "layers_0001_to_0001", "layers_0002_to_0002", "outside_layers"]

# Converts with a group for every layer, and kills itself when so many tensors are done.
KILLED = """
import os, signal, sys
from minference_jax.convert import checkpoint
checkpoint.GROUP_BYTES = 1
source, destination, tensors = sys.argv[1:]
count = 0
def progress(done, total, name):
    global count
    count += 1
    if count == int(tensors):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.convert_model(source, destination, progress=progress)
"""


def assert_same_folders(one, other):
    """The same files, but for those in which Orbax writes the time."""
    assert names_in(one) == names_in(other)
    for path in (path for path in one.iterdir() if path.is_file()):
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    assert_same(load_parameters(one)[1], load_parameters(other)[1])


@pytest.fixture
def source(make, tmp_path):
    return make.folder(tmp_path / "hf", tokenizer=False)


@pytest.fixture
def destination(tmp_path):
    return tmp_path / "out" / "checkpoint"


@pytest.fixture(autouse=True)
def _a_group_for_every_layer(monkeypatch):
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", 1)


@pytest.fixture
def read_layers(monkeypatch):
    """Which layer each tensor that is read belongs to, as they are read; None = outside the layers."""
    layers, read = [], HuggingFaceFolder.read

    def noted(self, name, *rows):
        layers.append(int(name.split(".")[2]) if name.startswith("model.layers.") else None)
        return read(self, name, *rows)

    monkeypatch.setattr(HuggingFaceFolder, "read", noted)
    return layers


@pytest.fixture
def interrupt(monkeypatch):
    """Converts until so many tensors are done: 3 lie outside the layers, each of the 3 layers has 9."""

    def until(tensors, *paths, **options):
        count = 0

        def progress(done, total, name):
            nonlocal count
            count += 1
            if count == tensors:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert_model(*paths, **options, progress=progress)

    return until


@pytest.mark.parametrize(("tensors", "again"), [(1, [None, 0, 1, 2]), (16, [1, 2]), (30, [2])])
def test_killed_conversion_leaves_nothing_that_loads_and_goes_on_with_unfinished_groups(
    source, destination, tmp_path, read_layers, tensors, again
):
    command = [sys.executable, "-P", "-c", KILLED, str(source), str(destination), str(tensors)]
    ended = subprocess.run(command, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    (left,) = destination.parent.iterdir()
    assert left != destination
    assert not is_checkpoint(left)
    with pytest.raises(ValueError, match="has neither"):
        load_parameters(left)
    with pytest.raises(ValueError, match="does not exist"):
        load_parameters(destination)
    convert_model(source, destination)
    assert list(dict.fromkeys(read_layers)) == again
    assert names_in(destination.parent) == ["checkpoint"]
    assert names_in(destination / "weights") == GROUPS
    assert_same_folders(destination, convert_model(source, tmp_path / "uninterrupted"))


def test_interrupted_conversion_goes_on_with_unfinished_groups(make, tmp_path, destination, read_layers, interrupt):
    source = make.folder(tmp_path / "with_tokenizer")
    interrupt(16, source, destination)
    (left,) = destination.parent.iterdir()
    assert {"outside_layers", "layers_0000_to_0000"} <= set(names_in(left / "weights"))
    assert "layers_0001_to_0001" not in names_in(left / "weights")
    read_layers.clear()
    interrupt(3, source, destination)
    assert set(read_layers) == {1}
    read_layers.clear()
    calls = []
    convert_model(source, destination, progress=lambda *call: calls.append(call))
    assert list(dict.fromkeys(read_layers)) == [1, 2]
    assert [name for *_, name in calls][:2] == [ALREADY_WRITTEN] * 2
    assert len(calls) == 2 + 18
    assert calls[-1][0] == calls[-1][1]
    assert names_in(destination.parent) == ["checkpoint"]
    assert_same_folders(destination, convert_model(source, tmp_path / "uninterrupted"))


def test_interrupted_conversion_of_a_gguf_file_goes_on(make, tmp_path, destination, interrupt):
    """Its tokenizer is built anew, so the list of its files could come out short where they are already there."""
    source = make.gguf(tmp_path / "m.gguf")
    interrupt(20, source, destination)
    convert_model(source, destination)
    assert_same_folders(destination, convert_model(source, tmp_path / "uninterrupted"))


def test_all_groups_may_be_there_already(source, destination, read_layers, monkeypatch):
    def interrupted(*paths, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_model(source, destination)
    read_layers.clear()
    convert_model(source, destination)
    assert read_layers == []
    assert_same(load_parameters(destination)[1], load_parameters(source)[1])


def change_time(source):
    stat = (source / "model.safetensors").stat()
    os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def change_size(source):
    stat = (source / "model.safetensors").stat()
    with (source / "model.safetensors").open("ab") as file:
        file.write(bytes(4))
    os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_config(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))


@pytest.mark.parametrize("change", [change_time, change_size, change_config])
def test_source_that_has_changed_is_converted_anew(source, destination, read_layers, interrupt, change):
    interrupt(16, source, destination)
    read_layers.clear()
    change(source)
    convert_model(source, destination)
    assert list(dict.fromkeys(read_layers)) == [None, 0, 1, 2]
    assert names_in(destination.parent) == ["checkpoint"]
    assert_same(load_parameters(destination)[1], load_parameters(source)[1])


@pytest.mark.parametrize("path", ["hf", "elsewhere"])
def test_another_dtype_or_source_is_converted_anew(source, destination, tmp_path, read_layers, interrupt, path):
    interrupt(16, source, destination)
    read_layers.clear()
    if path == "elsewhere":
        shutil.copytree(source, tmp_path / path)
    convert_model(tmp_path / path, destination, dtype="bfloat16" if path == "hf" else None)
    assert list(dict.fromkeys(read_layers)) == [None, 0, 1, 2]
    assert names_in(destination.parent) == ["checkpoint"]
    expected = load_parameters(source, dtype="bfloat16" if path == "hf" else None)
    assert_same(load_parameters(destination)[1], expected[1])


def test_groups_of_another_size_are_not_mixed(source, destination, monkeypatch, interrupt):
    interrupt(16, source, destination)
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", 2**28)
    convert_model(source, destination)
    assert names_in(destination / "weights") == ["layers_0000_to_0002", "outside_layers"]
    assert_same(load_parameters(destination)[1], load_parameters(source)[1])


def test_interrupted_replacement_leaves_the_old_checkpoint_and_goes_on(source, destination, read_layers, interrupt):
    convert_model(source, destination)
    interrupt(16, source, destination, overwrite=True, dtype="bfloat16")
    assert_same(load_parameters(destination)[1], load_parameters(source)[1])
    read_layers.clear()
    convert_model(source, destination, overwrite=True, dtype="bfloat16")
    assert list(dict.fromkeys(read_layers)) == [1, 2]
    assert_same(load_parameters(destination)[1], load_parameters(source, dtype="bfloat16")[1])
    assert names_in(destination.parent) == ["checkpoint"]


def test_left_over_of_another_conversion_goes_even_where_the_new_one_replaces(source, destination, interrupt):
    convert_model(source, destination)
    interrupt(16, source, destination, overwrite=True)
    convert_model(source, destination, overwrite=True, dtype="bfloat16")
    assert_same(load_parameters(destination)[1], load_parameters(source, dtype="bfloat16")[1])
    assert names_in(destination.parent) == ["checkpoint"]


def test_small_files_are_those_of_the_last_conversion(make, tmp_path, destination, interrupt):
    source = make.folder(tmp_path / "with_tokenizer")
    write_patterns(uniform_patterns(3, 4, Dense()), tmp_path / "p.json")
    interrupt(16, source, destination, patterns=tmp_path / "p.json")
    (source / "tokenizer_config.json").unlink()
    convert_model(source, destination)
    assert_same_folders(destination, convert_model(source, tmp_path / "uninterrupted"))
    assert not (destination / "patterns.json").exists()


def test_folder_of_a_living_process_is_not_taken_for_a_left_over(tmp_path):
    destination = tmp_path / "checkpoint"
    for identity in (None, "the same"):
        with written_aside(destination, identity) as first, written_aside(destination, identity) as second:
            (first / "mine").mkdir()
            assert second.is_dir()
            assert first != second
            assert not (second / "mine").exists()
    assert names_in(tmp_path) == []


def test_interrupted_folder_is_kept_only_where_it_can_be_taken_up(tmp_path):
    def interrupted(identity):
        with written_aside(tmp_path / "checkpoint", identity) as folder:
            (folder / "weights").mkdir()
            folders.append(folder)
            raise KeyboardInterrupt

    folders = []
    for identity in (None, "the same"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(identity)
        folder = folders[-1]
        assert folder.exists() == (identity is not None)
    with written_aside(tmp_path / "checkpoint", "the same") as again:
        assert again == folder
        assert (again / "weights").is_dir()
        publish(again, tmp_path / "checkpoint")
    assert names_in(tmp_path) == ["checkpoint"]


def test_finished_checkpoint_says_nothing_of_its_making(source, destination, interrupt):
    names = names_in(convert_model(source, destination))
    assert names == ["config.json", "minference-jax.json", "weights"]
    shutil.rmtree(destination)
    interrupt(16, source, destination)
    assert names_in(convert_model(source, destination)) == names


def test_checkpoint_with_one_group_as_earlier_releases_wrote_it_loads(source, destination):
    convert_model(source, destination)
    store = TensorStore(destination / "weights", GROUPS)
    tensors = {
        key: LazyTensor(shape=array.shape, dtype=array.dtype, read=lambda array=array: array)
        for key, array in store.read(list(store.tensors)).items()
    }
    store.close()
    shutil.rmtree(destination / "weights")
    save_tensors(destination / "weights", tensors)
    manifest = json.loads((destination / "minference-jax.json").read_text())
    del manifest["groups"]
    (destination / "minference-jax.json").write_text(json.dumps(manifest))
    assert_same(load_parameters(destination)[1], load_parameters(source)[1])


@pytest.mark.parametrize("groups", [["../x"], ["/x"], ["."], [".."], [""], ["a/b"], "weights", [1], {"a": 1}, None])
def test_group_that_is_no_name_of_a_folder_is_refused(source, destination, groups):
    convert_model(source, destination)
    manifest = json.loads((destination / "minference-jax.json").read_text())
    (destination / "minference-jax.json").write_text(json.dumps(manifest | {"groups": groups}))
    with pytest.raises(ValueError, match="which are not names of folders of weights") as error:
        load_parameters(destination)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [OSError, MemoryError, SystemExit])
def test_conversion_that_ran_out_of_something_goes_on(source, destination, read_layers, error):
    def progress(done, total, name):
        if name.startswith("layers.1."):
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        convert_model(source, destination, progress=progress)
    read_layers.clear()
    convert_model(source, destination)
    assert list(dict.fromkeys(read_layers)) == [1, 2]
    assert names_in(destination.parent) == ["checkpoint"]


def test_group_that_is_not_whole_is_written_again(source, destination, tmp_path, read_layers, interrupt):
    interrupt(20, source, destination)
    (left,) = destination.parent.iterdir()
    for path in (left / "weights" / "layers_0000_to_0000").rglob("_METADATA"):
        path.write_bytes(path.read_bytes()[:20])
    read_layers.clear()
    convert_model(source, destination)
    assert list(dict.fromkeys(read_layers)) == [0, 1, 2]
    assert_same_folders(destination, convert_model(source, tmp_path / "uninterrupted"))

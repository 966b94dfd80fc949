"""Measured tile sizes: what a table finds, and which files are read, written and refused."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minference_jax import TileTable, read_tiles, tile_table
from minference_jax.kernels.tiles import Device, TileConfig
from minference_jax.tile_table import TileEntry, write_tiles

H100 = Device(platform="cuda", kind="NVIDIA H100 80GB HBM3", compute_capability=(9, 0))
CPU = Device(platform="cpu", kind="cpu")
SMALL, WIDE, DEEP = TileConfig(block_kv=32), TileConfig(block_q=128), TileConfig(num_warps=8, num_stages=3)


def entry(tiles, device=H100, implementation="triton", head_dim=128, dtype="bfloat16", **times):
    return TileEntry(
        device=device.kind, implementation=implementation, head_dim=head_dim, dtype=dtype, tiles=tiles, **times
    )


TABLE = TileTable(
    (
        entry(DEEP, measured_ms=1.5, heuristic_ms=2.0),
        entry(WIDE, CPU, "xla", 64, "float32", measured_ms=7, heuristic_ms=7),
        entry(SMALL, head_dim=64),
        entry(WIDE, implementation="xla"),
    )
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiles.json"


@pytest.fixture
def content(path):
    """What a whole file holds, to be damaged."""
    write_tiles(path, TABLE)
    return json.loads(path.read_text())


def test_a_table_finds_the_entry_of_the_call_and_no_other():
    assert TABLE.find(H100, "triton", 128, "bfloat16") == DEEP
    assert TABLE.find(H100, "triton", 64, "bfloat16") == SMALL
    assert TABLE.find(H100, "xla", 128, "bfloat16") == WIDE
    assert TABLE.find(CPU, "xla", 64, "float32") == WIDE
    for call in (
        (CPU, "triton", 64, "float32"),
        (CPU, "xla", 128, "float32"),
        (CPU, "xla", 64, "bfloat16"),
        (H100, "xla", 64, "float32"),
    ):
        assert TABLE.find(*call) is None
    assert TileTable().find(H100, None, 128, "bfloat16") is None


def test_without_an_implementation_the_first_of_the_device_counts():
    assert TABLE.find(H100, None, 128, "bfloat16") == DEEP
    turned = TileTable(tuple(reversed(TABLE.entries)))
    assert turned.find(H100, None, 128, "bfloat16") == WIDE
    assert turned.find(H100, None, 64, "bfloat16") == SMALL


def test_a_new_entry_replaces_the_one_for_the_same_and_no_other():
    changed = TABLE.with_entry(entry(SMALL))
    assert changed.find(H100, "triton", 128, "bfloat16") == SMALL
    assert len(changed.entries) == len(TABLE.entries)
    grown = changed.with_entry(entry(DEEP, dtype="float16"))
    assert set(changed.entries) < set(grown.entries)
    assert grown.find(H100, "triton", 128, "float16") == DEEP
    assert TABLE.find(H100, "triton", 128, "bfloat16") == DEEP


def test_two_entries_for_the_same_are_refused():
    with pytest.raises(ValueError, match="two entries for cpu, xla, head_dim 64, float32"):
        TileTable((entry(WIDE, CPU, "xla", 64, "float32"), entry(SMALL, CPU, "xla", 64, "float32")))


ENTRIES = st.builds(
    entry,
    st.sampled_from([SMALL, WIDE, DEEP]),
    st.sampled_from([H100, CPU]),
    st.sampled_from(["triton", "xla"]),
    st.sampled_from([64, 128]),
    st.sampled_from(tile_table.DTYPES),
    measured_ms=st.none() | st.floats(min_value=1e-6, max_value=1e6),
)


@given(entries=st.lists(ENTRIES, unique_by=lambda one: one.place))
def test_a_written_table_is_read_as_it_was(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("tables") / "tiles.json"
    table = TileTable(tuple(entries))
    write_tiles(path, table)
    assert read_tiles(path) == table


def test_the_file_is_the_documented_one(path, content):
    assert (content["format"], content["version"]) == ("minference-jax tiles", 1)
    sizes = {"block_q": 64, "block_kv": 64, "num_warps": 8, "num_stages": 3}
    choice = content["devices"]["NVIDIA H100 80GB HBM3"]["triton"]["head_dim 128, bfloat16"]
    assert choice == sizes | {"measured_ms": 1.5, "heuristic_ms": 2.0}
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


def test_times_may_be_left_out(path, content):
    fields = content["devices"]["cpu"]["xla"]["head_dim 64, float32"]
    del fields["measured_ms"], fields["heuristic_ms"]
    path.write_text(json.dumps(content))
    assert read_tiles(path).find(CPU, "xla", 64, "float32") == WIDE


def test_a_failed_write_leaves_the_old_file(path, content, monkeypatch):
    monkeypatch.setattr(tile_table.Path, "replace", lambda *unused: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        write_tiles(path, TileTable())
    assert read_tiles(path) == TABLE
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


def test_the_folder_is_made(tmp_path):
    write_tiles(tmp_path / "new" / "tiles.json", TABLE)
    assert read_tiles(tmp_path / "new" / "tiles.json") == TABLE


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "not a file of tile sizes"),
        (b'{"format": "minference-jax/patterns", "version": 1}', "not a file of tile sizes"),
        (b'{"format": "minference-jax tiles", "format": 1}', "'format' is given twice"),
        (b'{"format": "minference-jax tiles", "version": 2}', "version 2 needs a newer minference-jax"),
        (b'{"format": "minference-jax tiles", "version": true}', "version=True must be a positive integer"),
        (b'{"format": "minference-jax tiles", "version": 1}', "missing field 'devices'"),
        (b" " * (tile_table.MAX_BYTES + 1), "too long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_foreign_files_are_refused_by_name(path, raw, says):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=says) as caught:
        read_tiles(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (["devices"], [], r"devices: \[\] must be an object"),
        (["devices", "cpu"], 3, "'cpu': 3 must be an object"),
        (["devices", "cpu", "xla"], None, "'cpu', 'xla': None must be an object"),
        (["devices", "cpu", "xla", "head_dim 64, float32"], [], r"'head_dim 64, float32': \[\] must be an object"),
        (["devices", "cpu", "xla", "head_dim 64, int8"], {}, "'head_dim 64, int8': a choice is for"),
        (["devices", "cpu", "xla", "head_dim 064, float32"], {}, "a choice is for"),
        (["devices", "cpu", ""], {"head_dim 64, float32": {}}, "missing field 'block_kv', 'block_q'"),
        (["more"], 1, "unknown field 'more'"),
    ],
    ids=str,
)
def test_damage_is_refused_and_says_where(path, content, place, value, says):
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says) as caught:
        read_tiles(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("block_q", 96, "block_q=96 must be a positive multiple of block_kv=64"),
        ("block_kv", 48, "block_kv=48 must be a power of two"),
        ("block_q", "64", "block_q='64' must be an integer"),
        ("block_q", 64.0, "block_q=64.0 must be an integer"),
        ("num_stages", True, "num_stages=True must be an integer"),
        ("num_stages", 0, "num_stages=0 must be at least 1"),
        ("block_q", 2**20, "block_q=1048576 must be an integer from 1 to 4096"),
        ("measured_ms", "fast", "measured_ms='fast' must be a positive number"),
        ("measured_ms", -1, "measured_ms=-1 must be a positive number"),
        ("heuristic_ms", float("nan"), "heuristic_ms=nan must be a positive number"),
        ("lanes", 3, "unknown field 'lanes'"),
    ],
    ids=str,
)
def test_sizes_that_make_no_sense_are_refused_and_say_where(path, content, field, value, says):
    damaged = copy.deepcopy(content)
    damaged["devices"][H100.kind]["triton"]["head_dim 128, bfloat16"][field] = value
    path.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=says) as caught:
        read_tiles(path)
    where = f"{path}: '{H100.kind}', 'triton', 'head_dim 128, bfloat16': "
    assert str(caught.value).startswith(where)


def test_a_missing_file_is_an_os_error(path):
    with pytest.raises(FileNotFoundError):
        read_tiles(path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"head_dim": 0}, "head_dim=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"implementation": ""}, "implementation='' must be a name"),
        ({"device": Device(platform="cpu", kind="")}, "device='' must be a name"),
        ({"measured_ms": float("inf")}, "measured_ms=inf"),
    ],
)
def test_an_entry_that_a_file_could_not_give_back_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        entry(SMALL, **wrong)

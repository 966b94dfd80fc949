"""Tile sizes are chosen among those that give the right result, and stored beside what is there."""

import itertools

import jax
import pytest

from minference_jax import TileTable, cli, loading, read_tiles
from minference_jax.bench import attention, autotune
from minference_jax.bench.autotune import Trial, candidates
from minference_jax.bench.oracle import WrongResult
from minference_jax.implementations import IMPLEMENTATIONS, Implementation
from minference_jax.kernels import reference
from minference_jax.kernels.layouts import layout_mask
from minference_jax.kernels.tiles import Device, TileConfig, shared_memory_bytes, triton_tiles
from minference_jax.tile_table import TileEntry, write_tiles

H100 = Device(platform="cuda", kind="NVIDIA H100 80GB HBM3", compute_capability=(9, 0))
SHAPE = {"head_dim": 16, "dtype": "float32", "num_heads": 2, "num_kv_heads": 1, "length": 300, "repeats": 1}
BY_RULE, WIDE, SMALL, MANY = (
    TileConfig(),
    TileConfig(block_q=128),
    TileConfig(block_kv=32),
    TileConfig(num_warps=8),
)
OPTIONS = [word for name, value in SHAPE.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def tune(monkeypatch):
    """Runs autotune with a kernel that is the oracle, times that are given, and faults of given tiles.

    times: milliseconds by tiles, one number or one for each time that the tiles are timed. faults: a number to add to
    the output, or an error to raise.
    """

    def tunes(times, faults=None):
        faults = faults or {}

        def sparse(q, k, v, layout, *, scale, q_offset, kv_len, tiles):
            fault = faults.get(tiles, 0.0)
            if isinstance(fault, Exception):
                raise fault
            mask = layout_mask(layout, q_offset, kv_len, q.shape[1], k.shape[1], tiles)
            out, lse = reference.attention(q, k, v, mask, scale=scale)
            return out + fault, lse

        def timed(calls, *, in_turn):
            tiles = {name: run.keywords["tiles"] for name, (_, run) in calls.items()}
            return {name: [next(clocks[one])] * calls[name][0] for name, one in tiles.items()}

        clocks = {
            tiles: itertools.repeat(ms) if isinstance(ms, int | float) else iter(ms) for tiles, ms in times.items()
        }
        entry = Implementation("made up", lambda *unused: BY_RULE, None, sparse)
        monkeypatch.setattr(autotune, "first_sparse", lambda *unused: entry)
        monkeypatch.setattr(autotune, "candidates", lambda *unused: [WIDE, BY_RULE, SMALL, MANY])
        monkeypatch.setattr(autotune, "timed", timed)
        return autotune.autotune(**SHAPE)

    return tunes


def test_the_fastest_is_chosen_and_every_choice_is_reported(tune):
    first, *others, chosen = tune({BY_RULE: 10.0, WIDE: 8.0, SMALL: 5.0, MANY: 12.0})
    assert (first.tiles, first.ms, first.default_ms) == (BY_RULE, 10, None)
    assert [one.tiles for one in others] == [WIDE, SMALL, MANY]
    assert [one.share for one in others] == [0.8, 0.5, 1.2]
    assert all(one.error <= 1e-4 and one.reason is None for one in (first, *others))
    assert chosen == TileEntry(
        device=jax.devices()[0].device_kind,
        implementation="made up",
        head_dim=16,
        dtype="float32",
        tiles=SMALL,
        measured_ms=5.0,
        heuristic_ms=10.0,
    )


def test_a_small_gain_replaces_nothing(tune):
    *_, chosen = tune({BY_RULE: 10.0, WIDE: 9.9, SMALL: 9.85, MANY: 10})
    assert (chosen.tiles, chosen.measured_ms, chosen.heuristic_ms) == (BY_RULE, 10, 10)


def test_a_gain_that_does_not_come_again_replaces_nothing(tune):
    *_, chosen = tune({BY_RULE: 10.0, WIDE: 10.0, SMALL: (5.0, 10.5), MANY: 10.0})
    assert chosen.tiles == BY_RULE
    *_, chosen = tune({BY_RULE: 10.0, WIDE: 9.0, SMALL: (5.0, 10.5), MANY: 10.0})
    assert (chosen.tiles, chosen.measured_ms) == (WIDE, 9)


def test_what_is_wrong_or_fails_is_reported_and_never_timed(tune):
    faults = {
        WIDE: 0.01,
        SMALL: NotImplementedError("block_kv=32 is not for it"),
        MANY: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too many registers\nand a page about them"),
    }
    first, *others, chosen = tune({BY_RULE: 10.0}, faults)  # no times of the others are to be had
    reasons = [one.reason for one in others]
    assert "128 x 64, 4 warps, 2 stages, 1024 tokens: the error against the oracle is 1.00e-02" in reasons[0]
    assert reasons[1:] == ["block_kv=32 is not for it", "RESOURCE_EXHAUSTED: too many registers"]
    assert all(one.ms is None and one.share == float("inf") for one in others)
    assert chosen.tiles == first.tiles == BY_RULE


def test_without_the_tiles_by_rule_there_is_nothing_to_compare_with(tune):
    with pytest.raises(WrongResult, match="against the oracle"):
        next(tune({}, {BY_RULE: 0.01}))
    with pytest.raises(MemoryError, match="300 tokens, 2 heads of head_dim=16, float32"):
        next(tune({}, {BY_RULE: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")}))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
@pytest.mark.parametrize(("head_dim", "itemsize"), [(64, 2), (128, 2), (256, 2), (128, 4), (256, 4)])
def test_candidates_of_a_gpu_fit_its_shared_memory(capability, head_dim, itemsize):
    device = Device(platform="cuda", kind="a GPU", compute_capability=capability)
    found = candidates(device, "triton", head_dim, itemsize)
    assert found
    assert len(set(found)) == len(found)
    for tiles in found:
        assert shared_memory_bytes(tiles, head_dim, itemsize) <= device.shared_memory
        assert tiles.block_q * head_dim <= 128 * 128
    assert set(found) <= set(candidates(H100, "triton", head_dim, itemsize))


def test_candidates_hold_the_usual_rule_and_sizes_around_it():
    for head_dim, itemsize in ((64, 2), (128, 2), (256, 2), (64, 4), (128, 4), (256, 4)):
        assert triton_tiles(H100, head_dim, itemsize) in candidates(H100, "triton", head_dim, itemsize)
    found = candidates(H100, "triton", 128, 2)
    for name in ("num_warps", "num_stages", "block_q"):
        assert len({getattr(tiles, name) for tiles in found}) > 1
    assert {tiles.block_kv for tiles in found} == {32, 64, 128}
    (xla,) = [entry for entry in IMPLEMENTATIONS if entry.name == "xla"]
    assert xla.tiles(H100, 128, 2) in candidates(H100, "xla", 128, 2)
    for head_dim, stages in ((128, {2, 3}), (256, {2})):  # three do not fit
        assert {one.num_stages for one in candidates(H100, "mosaic_gpu", head_dim, 2)} == stages


def test_lists_of_short_prompts_keep_a_quarter_of_the_distances():
    shape = {name: SHAPE[name] for name in ("head_dim", "dtype", "num_heads", "num_kv_heads")}
    sizes = {
        length: autotune.tuning_case(length=length, **shape).sizes_at(length, BY_RULE) for length in (2, 400, 65536)
    }
    assert [one.pattern.slash_size for one in sizes.values()] == [1, 100, 2048]
    with pytest.raises(ValueError, match="num_heads=3 must be a multiple of num_kv_heads=2"):
        autotune.tuning_case(length=64, **shape | {"num_heads": 3, "num_kv_heads": 2})


@pytest.mark.slow
def test_every_candidate_of_the_pure_jax_kernel_gives_the_right_result(monkeypatch):
    monkeypatch.setattr(autotune, "timed", lambda calls, in_turn: {name: [1.0] for name in calls})
    *trials, chosen = autotune.autotune(implementation="xla", **SHAPE)
    assert {one.tiles for one in trials} == set(candidates(H100, "xla", 16, 4))
    assert [one.reason for one in trials] == [None] * len(trials)
    assert (chosen.implementation, chosen.tiles) == ("xla", BY_RULE)


# --- the command ------------------------------------------------------------------------------------------------------

FOUND = TileEntry(
    device="cpu", implementation="xla", head_dim=16, dtype="float32", tiles=WIDE, measured_ms=1.5, heuristic_ms=2.0
)
OTHER = TileEntry(device="a GPU", implementation="triton", head_dim=16, dtype="float32", tiles=MANY)


@pytest.fixture
def measured(monkeypatch):
    """Puts given results in place of measurements; gives what the command asked for."""
    asked = {}

    def results(**options):
        asked.update(options)
        yield Trial(BY_RULE, 1e-6, 2.0)
        yield Trial(SMALL, reason="it is wrong")
        yield Trial(WIDE, 1e-6, 1.5, 2.0)
        yield FOUND

    monkeypatch.setattr("minference_jax.cli.autotune_command.autotune", results)
    return asked


def test_the_choice_is_printed_and_added_to_what_the_file_holds(measured, tmp_path, capsys):
    output = tmp_path / "folder" / "tiles.json"
    write_tiles(output, TileTable((OTHER,)))
    assert cli.main(["autotune", *OPTIONS, "--output", str(output)]) == 0
    assert measured == SHAPE | {"implementation": None}
    assert read_tiles(output) == TileTable((OTHER, FOUND))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("64 x 64, 4 warps, 2 stages")
    assert lines[0].endswith("by rule")
    assert lines[1].endswith("left out: it is wrong")
    assert lines[2].endswith("0.750 of the time by rule")
    assert lines[3] == ("xla on cpu, head_dim 16, float32: 128 x 64, 4 warps, 2 stages, 1.500 ms; by rule 2.000 ms")
    assert lines[4] == f"stored in {output}"


def test_without_output_it_is_the_file_that_models_read(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(loading.platformdirs, "user_config_dir", lambda name, appauthor: str(tmp_path / name))
    assert cli.main(["autotune", *OPTIONS]) == 0
    assert loading.default_tiles_file() == tmp_path / "minference-jax" / "tiles.json"
    assert loading.choose_tiles(None) == TileTable((FOUND,))


def test_a_damaged_file_is_refused_before_anything_is_measured(measured, tmp_path, capsys):
    output = tmp_path / "tiles.json"
    output.write_text("{}")
    assert cli.main(["autotune", *OPTIONS, "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"minference-jax: error: {output}: ")
    assert (printed.out, measured, output.read_text()) == ("", {}, "{}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-heads", "3", "--num-kv-heads", "2"], "num_heads=3 must be a multiple of num_kv_heads=2"),
        (["--implementation", "triton"], "it needs an NVIDIA GPU"),
        (["--implementation", "mosaic"], "invalid choice: 'mosaic'"),
        (["--length", "0"], "'0' must be an integer of at least 1"),
    ],
)
def test_mistakes_are_one_sentence_and_store_nothing(options, says, tmp_path, capsys):
    output = tmp_path / "tiles.json"
    assert cli.main(["autotune", *OPTIONS, "--output", str(output), *options]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not output.exists()


def test_a_wrong_result_of_the_default_is_one_sentence_and_stores_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention.oracle, "TOLERANCES", {"float32": 0.0})
    output = tmp_path / "tiles.json"
    assert cli.main(["autotune", *OPTIONS, "--implementation", "xla", "--output", str(output)]) == 2
    assert "the error against the oracle is" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("command", ["prefill", "generate"])
def test_a_model_is_loaded_with_the_tiles_of_the_named_file(command, tmp_path, monkeypatch, capsys):
    def stop(model, **options):
        raise KeyError(options["tiles"])

    monkeypatch.setattr("minference_jax.cli.inputs.load", stop)
    for more, tiles in (([], None), (["--tiles", "mine.json"], "mine.json")):
        with pytest.raises(KeyError) as told:
            cli.main([command, "--prompt", "one", *more])
        assert told.value.args == (tiles,)
    monkeypatch.undo()
    (tmp_path / "tiles.json").write_text("[]")
    assert cli.main([command, "--prompt", "one", "--tiles", str(tmp_path / "tiles.json")]) == 2
    assert "tiles.json: without" in capsys.readouterr().err

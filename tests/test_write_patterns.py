"""Writing pattern files: what is written in either format is read back exactly."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_contents import EVERY_KIND, OURS, SMALL, saved

from minference_jax.patterns import (
    PUBLISHED_DEFAULT,
    AShape,
    BlockSparse,
    ModelPatterns,
    PatternKind,
    VerticalSlash,
    read_patterns,
    uniform_patterns,
    write_patterns,
)

PUBLISHED = Path(__file__).parent / "../../shared/data/minference_configs"


def test_ours_reads_back_what_was_written(tmp_path):
    path = saved(tmp_path, OURS)
    patterns = read_patterns(path)
    write_patterns(patterns, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == OURS
    assert read_patterns(tmp_path / "again.json") == patterns
    plain = uniform_patterns(2, 2, BlockSparse(num_blocks=3))
    write_patterns(plain, path)
    assert read_patterns(path) == plain


SIZES = st.integers(1, 2**31 - 1)
HEADS = st.one_of(
    st.builds(VerticalSlash, vertical_size=SIZES, slash_size=SIZES),
    st.builds(AShape, sink_size=SIZES, window_size=SIZES),
    st.builds(BlockSparse, num_blocks=SIZES),
    st.just(PUBLISHED_DEFAULT),
)
SCORES = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TABLES = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: st.lists(st.lists(st.tuples(HEADS, SCORES), min_size=shape[1], max_size=shape[1]), min_size=shape[0])
)


@settings(max_examples=100)
@given(table=TABLES, format=st.sampled_from(["minference-jax", "published"]))
def test_any_patterns_come_back_from_either_format(tmp_path_factory, table, format):
    scores = tuple(tuple(score for _, score in row) for row in table)
    patterns = ModelPatterns(
        layers=tuple(tuple(head for head, _ in row) for row in table),
        scores=scores if any(score is not None for row in scores for score in row) else None,
        source="test",
    )
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_patterns(patterns, path, format=format)
    assert read_patterns(path) == patterns


@pytest.mark.parametrize(
    "content", [SMALL, [{"2": ["stream_llm", 1, 1, 0]}, {}], [{}, {"5": SMALL[1]["1"]}]], ids=["kinds", "last", "first"]
)
def test_published_to_ours_to_published_is_exact(tmp_path, content):
    write_patterns(read_patterns(saved(tmp_path, content)), tmp_path / "ours.json")
    write_patterns(read_patterns(tmp_path / "ours.json"), tmp_path / "published.json", format="published")
    assert (tmp_path / "published.json").read_text() == json.dumps(content) + "\n"


def test_a_published_file_of_defaults_alone_still_tells_the_number_of_heads(tmp_path):
    patterns = uniform_patterns(2, 3, PUBLISHED_DEFAULT)
    write_patterns(patterns, tmp_path / "published.json", format="published")
    assert json.loads((tmp_path / "published.json").read_text()) == [
        {"2": ["vertical_and_slash", 1000, 6096, None]},
        {},
    ]
    assert read_patterns(tmp_path / "published.json") == patterns


def test_patterns_for_whole_block_diagonals_are_not_written_in_the_published_format(tmp_path):
    patterns = ModelPatterns(layers=EVERY_KIND[1:], slash_granularity="block", source="test")
    with pytest.raises(ValueError, match="no place for slash_granularity='block'"):
        write_patterns(patterns, tmp_path / "x.json", format="published")


def test_a_dense_head_has_no_published_name(tmp_path):
    with pytest.raises(ValueError, match="layer 0, head 1 is dense, for which the published format has no name"):
        write_patterns(ModelPatterns(layers=EVERY_KIND, source="test"), tmp_path / "x.json", format="published")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format='yaml' must be 'minference-jax' or 'published'"):
        write_patterns(uniform_patterns(1, 1), tmp_path / "x.json", format="yaml")


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = saved(tmp_path, OURS)
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_patterns(uniform_patterns(1, 1), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published pattern files are not beside this checkout")
def test_every_published_file_loads_and_round_trips(tmp_path):
    files = sorted(PUBLISHED.glob("*.json"))
    assert len(files) == 14
    kinds = dict.fromkeys(PatternKind, 0)
    for path in files:
        patterns = read_patterns(path)
        content = json.loads(path.read_text())
        patterns.check(len(content), len(content[0]))
        for kind in patterns.arrays().kind.flat:
            kinds[PatternKind(kind)] += 1
        write_patterns(patterns, tmp_path / "ours.json")
        write_patterns(read_patterns(tmp_path / "ours.json"), tmp_path / "published.json", format="published")
        assert (tmp_path / "published.json").read_bytes().strip() == path.read_bytes().strip()
    assert kinds == {
        PatternKind.VERTICAL_SLASH: 29_104 - 43,
        PatternKind.A_SHAPE: 43,
        PatternKind.BLOCK_SPARSE: 0,
        PatternKind.DENSE: 0,
    }

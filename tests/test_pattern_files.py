"""Pattern files: the two formats are read strictly and written back exactly."""

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minference_jax.patterns import (
    PUBLISHED_DEFAULT,
    AShape,
    BlockSparse,
    Dense,
    ModelPatterns,
    PatternKind,
    VerticalSlash,
    read_patterns,
    uniform_patterns,
    write_patterns,
)

PUBLISHED = Path(__file__).parent / "../../shared/data/minference_configs"
SMALL = [
    {"0": ["vertical_and_slash", 30, 800, 0.5], "1": ["stream_llm", 100, 800, 3]},
    {"1": ["block_sparse", 8, 1, 0.25]},
]
OURS = {
    "format": "minference-jax/patterns",
    "version": 1,
    "model": "tiny",
    "score": {"name": "recall", "direction": "higher_is_better"},
    "layers": [
        [{"kind": "vertical_slash", "vertical_size": 3, "slash_size": 4, "score": 0.5}, {"kind": "dense"}],
        [{"kind": "a_shape", "sink_size": 1, "window_size": 2}, {"kind": "block_sparse", "num_blocks": 7, "score": 1}],
    ],
}
EVERY_KIND = (
    (VerticalSlash(vertical_size=3, slash_size=4), Dense()),
    (AShape(sink_size=1, window_size=2), BlockSparse(num_blocks=7)),
)


def saved(tmp_path, content):
    path = tmp_path / "patterns.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")  # a lone surrogate, too, which no text has
    return path


def refusal(path):
    """Give the message with which a file is refused, after checking that it is one sentence that names the file."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_patterns(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    assert type(error.value) is ValueError
    return message.removeprefix(f"{path}: ")


def ours_with(*path, **changes):
    """Give OURS with some fields of the object at path changed, or removed where the value is ...."""
    content = json.loads(json.dumps(OURS))
    place = content
    for step in path:
        place = place[step]
    for name, value in changes.items():
        place[name] = value
        if value is ...:
            del place[name]
    return content


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_published_format_is_read_and_a_missing_head_has_its_default(tmp_path):
    patterns = read_patterns(saved(tmp_path, SMALL))
    assert patterns.layers == (
        (VerticalSlash(vertical_size=30, slash_size=800), AShape(sink_size=100, window_size=800)),
        (PUBLISHED_DEFAULT, BlockSparse(num_blocks=8)),
    )
    assert patterns.scores == ((0.5, 3), (None, 0.25))
    assert (patterns.score_name, patterns.score_direction, patterns.model) == (None, None, None)
    assert patterns.source == str(tmp_path / "patterns.json")
    assert VerticalSlash(vertical_size=1000, slash_size=6096) == PUBLISHED_DEFAULT


def test_our_format_is_read(tmp_path):
    patterns = read_patterns(saved(tmp_path, OURS))
    assert patterns.layers == EVERY_KIND
    assert patterns.scores == ((0.5, None), (None, 1))
    assert (patterns.model, patterns.score_name, patterns.score_direction) == ("tiny", "recall", "higher_is_better")
    assert (patterns.slash_granularity, patterns.source) == (None, str(tmp_path / "patterns.json"))  # an older file
    said = read_patterns(saved(tmp_path, ours_with(source="search at 0.3", slash_granularity="block")))
    assert said.slash_granularity == "block"
    assert said.made_by == "search at 0.3"
    assert said.source == f"{tmp_path / 'patterns.json'} (search at 0.3)"
    write_patterns(said, tmp_path / "again.json")
    assert read_patterns(tmp_path / "again.json") == said
    bare = read_patterns(saved(tmp_path, ours_with(score=None, model=...)))
    assert (bare.model, bare.score_name, bare.score_direction, bare.scores) == (None, None, None, patterns.scores)


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8-sig")
    assert read_patterns(path).num_heads == 2


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("vertical_and_slash", "must be [kind, size1, size2, score]"),
        (None, "must be [kind"),
        ({"0": 1}, "must be [kind"),
        (["vertical_and_slash", 30, 800], "must be [kind"),
        (["vertical_and_slash", 30, 800, 1, 1], "must be [kind"),
        (["dense", 30, 800, 1], "kind 'dense' must be one of vertical_and_slash, stream_llm, block_sparse"),
        (["vertical_slash", 30, 800, 1], "kind 'vertical_slash' must be"),
        ([["vertical_and_slash"], 30, 800, 1], "kind ['vertical_and_slash'] must be"),
        (["vertical_and_slash", 0, 800, 1], "vertical_size=0 must be from 1 to"),
        (["vertical_and_slash", 30, -800, 1], "slash_size=-800 must be from 1"),
        (["vertical_and_slash", True, 800, 1], "vertical_size=True must be an integer"),
        (["vertical_and_slash", 30.0, 800, 1], "vertical_size=30.0 must be an integer"),
        (["vertical_and_slash", "30", 800, 1], "vertical_size='30' must be an integer"),
        (["vertical_and_slash", 2**31, 800, 1], "vertical_size=2147483648 must be from 1 to 2147483647"),
        (["vertical_and_slash", 30, float("nan"), 1], "slash_size=nan must be an integer"),
        (["stream_llm", 100, None, 1], "window_size=None must be an integer"),
        (["stream_llm", 0, 100, 1], "sink_size=0 must be"),
        (["block_sparse", 0, 1, 1], "num_blocks=0 must be"),
        (["block_sparse", 8, 100, 1], "second size of block_sparse, 100, must be 1"),
        (["block_sparse", 8, True, 1], "second size of block_sparse, True, must be 1"),
        (["vertical_and_slash", 30, 800, float("nan")], "score=nan must be a finite number"),
        (["vertical_and_slash", 30, 800, float("-inf")], "score=-inf must be a finite number"),
        (["vertical_and_slash", 30, 800, 10**400], "must be a"),
        (["vertical_and_slash", 30, 800, "good"], "score='good' must be a number or null"),
        (["vertical_and_slash", 30, 800, False], "score=False must be a number or null"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_published_head_is_refused_with_its_layer_and_index(tmp_path, head, message):
    said = refusal(saved(tmp_path, [SMALL[0], {"0": SMALL[0]["0"], "1": head}]))
    assert said.startswith("layer 1, head '1': ")
    assert message in said


@pytest.mark.parametrize(
    "key", ["", "-1", "01", "+1", " 1", "1 ", "1.0", "١", "head", "1024", "9" * 5000], ids=lambda k: k[:9]
)
def test_a_wrong_head_index_is_refused_with_its_layer(tmp_path, key):
    said = refusal(saved(tmp_path, [SMALL[0], {key: SMALL[0]["0"]}]))
    assert said.startswith("layer 1, head '")
    assert said.endswith("a head index must be an integer from 0 to 1023")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        ("not json", "not JSON: "),
        ('[{"0": ', "not JSON: "),
        ("null", "holds a JSON array (published format) or object (minference-jax format)"),
        ("17", "holds a JSON array"),
        ('"text"', "holds a JSON array"),
        ("[]", "num_layers=0 must be from 1 to 1024"),
        ("[" + "{}," * 1024 + "{}]", "num_layers=1025 must be from 1 to 1024"),
        ("[{}]", "no layer names a head"),
        ("[[]]", "layer 0: [] must be an object"),
        ('[{"0": ["stream_llm", 1, 1, 1], "0": ["stream_llm", 2, 2, 2]}]', "layer 0: head '0' is given twice"),
        ("[" * 200_000, "the JSON is nested too deeply"),
        ('[{"0": ["stream_llm", ' + "1" * 9000 + ", 1, 1]}]", "layer 0, head '0': sink_size='111"),
        ("{}", 'a JSON object without "format": "minference-jax/patterns" is not a pattern file'),
        ('{"layers": [], "layers": []}', "field 'layers' is given twice"),
        ('{"model_type": "llama"}', 'a JSON object without "format"'),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_of_neither_format_is_refused(tmp_path, text, message):
    assert message in refusal(saved(tmp_path, text))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x80\x02]q\x00.", "not JSON: "),
        (b"\xff\xfe[\x00]\x00", "not JSON: "),
        (b"GGUF" + bytes(2**26), "is too long"),
    ],
    ids=["pickle", "utf-16", "weights"],
)
def test_a_file_that_is_not_text_is_refused(tmp_path, raw, message):
    path = tmp_path / "patterns.json"
    path.write_bytes(raw)
    assert message in refusal(path)


def test_an_unreadable_file_is_the_systems_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_patterns(tmp_path / "nowhere.json")
    with pytest.raises(OSError, match=tmp_path.name):
        read_patterns(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ours_with(format="other"), "without"),
        (ours_with(version=2), "version 2 needs a newer minference-jax: this one reads 1"),
        (ours_with(version=2, new_field=1), "version 2 needs a newer minference-jax"),
        (ours_with(version=...), "version=None must be"),
        (ours_with(version=0), "version=0 must be"),
        (ours_with(version=True), "version=True must be"),
        (ours_with(version="1"), "version='1' must be"),
        (ours_with(extra=1, another=2), "unknown field 'another', 'extra'"),
        (ours_with(layers=...), "missing field 'layers'"),
        (ours_with(layers={}), "layers={} must be an array"),
        (ours_with(layers=[]), "one tuple per layer"),
        (ours_with(layers=[[]]), "layer 0: [] must be an array with an object for each head"),
        (ours_with(layers=[OURS["layers"][0], OURS["layers"][0][:1]]), "layer 1 has 1 heads and layer 0 has 2"),
        (ours_with(model=3), "model=3 must be a name"),
        (ours_with(source=3), "source=3 must be a text that says how the patterns were made"),
        (ours_with(source=""), "source='' must be a text"),
        (ours_with(slash_granularity="dot"), 'slash_granularity=\'dot\' must be "line", "block" or None'),
        (ours_with(slash_granularity=["line"]), "slash_granularity=['line'] must be"),
        (ours_with(score="recall"), "score: 'recall' must be an object"),
        (ours_with("score", extra=1), "score: unknown field 'extra'"),
        (ours_with("score", direction="up"), "score: the direction of the score, 'up', must be higher_is_better or"),
        (ours_with("score", name=""), "score: the name of the score, '', must be"),
        (ours_with("score", name=...), "score: missing field 'name'"),
        (
            ours_with("layers", 1, 0, kind="stream_llm"),
            "layer 1, head 0: kind 'stream_llm' must be one of vertical_slash",
        ),
        (ours_with("layers", 1, 0, kind=...), "layer 1, head 0: kind None must be one of"),
        (ours_with("layers", 1, 0, sink_size=...), "layer 1, head 0: missing field 'sink_size'"),
        (ours_with("layers", 1, 0, slash_size=4), "layer 1, head 0: unknown field 'slash_size'"),
        (ours_with("layers", 1, 0, sink_size=0), "layer 1, head 0: sink_size=0 must be"),
        (ours_with("layers", 1, 0, score=float("nan")), "layer 1, head 0: score=nan must be a finite number"),
        (ours_with("layers", 0, 1, num_blocks=3), "layer 0, head 1: unknown field 'num_blocks'"),
        (ours_with("layers", 0)["layers"][0:1], "layer 0: [{"),
    ],
    ids=itertools.count(),
)
def test_a_wrong_file_of_ours_is_refused_by_field(tmp_path, content, message):
    assert message in refusal(saved(tmp_path, content))


def test_a_field_given_twice_in_a_head_is_refused(tmp_path):
    text = json.dumps(OURS).replace('"num_blocks": 7', '"num_blocks": 7, "num_blocks": 8')
    assert refusal(saved(tmp_path, text)) == "layer 1, head 1: field 'num_blocks' is given twice"


TEXT = st.sampled_from(
    [
        "",
        "0",
        "1",
        "kind",
        "vertical_and_slash",
        "block_sparse",
        "dense",
        "format",
        "score",
        "source",
        "slash_granularity",
        "\ud800",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.just(10**30) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)
PATHS = st.sampled_from([(), ("layers",), ("layers", 0), ("layers", 1, 0), ("layers", 1, 1), ("score",)])


@settings(max_examples=200)
@given(value=VALUES, path=PATHS, name=TEXT)
@example(value=[[10**30] * 6] * 6, path=(), name="")
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_sentence(tmp_path_factory, value, path, name):
    changed = ours_with(*path)
    place = changed
    for step in path:
        place = place[step]
    if isinstance(place, dict):
        place[name] = value
    else:
        place.append(value)
    for content in (value, [value], [{"0": value}], changed):
        file = saved(tmp_path_factory.getbasetemp(), content)
        try:
            read_patterns(file)
        except ValueError:
            refusal(file)


# --- writing ----------------------------------------------------------------------------------------------------------


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


# --- the published files themselves -----------------------------------------------------------------------------------


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

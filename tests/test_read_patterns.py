"""Reading pattern files: both formats are read strictly, and anything else is refused in one sentence."""

import itertools
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pattern_contents import EVERY_KIND, OURS, SMALL, saved

from minference_jax.patterns import (
    PUBLISHED_DEFAULT,
    AShape,
    BlockSparse,
    VerticalSlash,
    read_patterns,
    write_patterns,
)


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

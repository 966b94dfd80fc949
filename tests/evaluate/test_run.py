"""Questions asked with several attentions: dense beside each, contexts shared, runs that go on."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minference_jax import AShape, Dense, ModelPatterns, VerticalSlash
from minference_jax.evaluate import Contender, equal_cost_a_shape, evaluate_answers, journal, summarize
from minference_jax.evaluate import run as run_module
from minference_jax.evaluate.contenders import with_dense
from minference_jax.evaluate.journal import Journal
from minference_jax.evaluate.run import shared_prefix
from minference_jax.evaluate.samples import Sample
from minference_jax.kernels.tiles import TileConfig
from minference_jax.models.digest import weights_digest
from minference_jax.tile_table import TileEntry, TileTable

SPARSE = Contender(name="sparse", attention="vertical_slash", pattern=VerticalSlash(vertical_size=30, slash_size=50))
EQUAL = Contender(name="a_shape", attention="a_shape", equal_cost_to="sparse", sink_size=16)
WIDE = TileConfig(block_q=128, block_kv=64)
RNG = np.random.default_rng(5)
CONTEXT = RNG.integers(0, 256, 600).tolist()


def make_samples(contexts=2, questions=1, answer="q"):
    found = []
    for index in range(contexts * questions):
        own = [index // questions, *CONTEXT, *RNG.integers(0, 256, 5).tolist(), index]
        found.append(
            Sample(
                task="ask",
                length=700,
                index=index,
                context=index // questions,
                prompt=tuple(own),
                answers=(answer,),
                metric="contains_all",
                max_new_tokens=4,
                about={"depth": index / 10},
            )
        )
    return found


def by_name(records):
    return {(record["attention"], record["index"]): record for record in records}


@pytest.fixture(scope="module")
def samples():
    return make_samples()


@pytest.fixture(scope="module")
def records(model, samples):
    return evaluate_answers(model, samples, [SPARSE, EQUAL])


def test_every_sample_is_asked_dense_first(model, samples, records):
    assert [record["attention"] for record in records] == ["dense", "sparse", "a_shape"] * 2
    for record in records:
        prompt = samples[record["index"]].prompt
        assert record["tokens"] == len(prompt)
        if record["attention"] == "dense":
            (expected,) = model.generate([prompt], attention="dense", max_new_tokens=4)
            assert (record["said"], record["density"], record["pattern"]) == (expected.text, 1.0, None)
        else:
            assert 0 < record["density"] < 1
            assert "for every head" in record["pattern"]


def test_a_shape_of_equal_cost_computes_as_many_tiles(records):
    found = by_name(records)
    for index in range(2):
        assert found["a_shape", index]["density"] == pytest.approx(found["sparse", index]["density"], abs=0.06)
        assert "AShape(sink_size=16, window_size=" in found["a_shape", index]["pattern"]


@pytest.mark.parametrize("density", [1e-6, 0.5, 1.0])
def test_window_of_equal_cost_is_the_nearest_there_is(model, density):
    length = 607
    prompt = [1] * length
    found = equal_cost_a_shape(model, length, density, 16)

    def cost(window):
        if not 64 <= window <= 640:
            return np.inf
        pattern = AShape(sink_size=16, window_size=window)
        return float(np.mean(model.prefill(prompt, attention="a_shape", pattern=pattern).density))

    costs = {window: abs(cost(window) - density) for window in range(64, 641, 64)}
    assert costs[found.window_size] == pytest.approx(min(costs.values()))


def test_shared_contexts_change_nothing_for_dense_attention(model):
    several = make_samples(contexts=2, questions=3)
    shared = by_name(evaluate_answers(model, several, [SPARSE]))
    whole = by_name(evaluate_answers(model, several, [SPARSE], share_contexts=False))
    for key, record in shared.items():
        assert record["shared_tokens"] == 601
        assert whole[key]["shared_tokens"] == 0
        if record["attention"] == "dense":
            assert record["said"] == whole[key]["said"]


def test_context_is_read_once_for_all_its_questions(model, monkeypatch):
    lengths, prefill = [], model.prefill
    monkeypatch.setattr(
        model, "prefill", lambda prompt, **options: lengths.append(len(prompt)) or prefill(prompt, **options)
    )
    evaluate_answers(model, make_samples(contexts=1, questions=3), [])
    assert lengths == [601]


def test_prefix_leaves_a_token_of_every_prompt_and_little_of_any():
    assert shared_prefix([(*CONTEXT, 3), (*CONTEXT, 4, 5)]) == 600
    assert shared_prefix([CONTEXT, [*CONTEXT, 3]]) == 599
    assert shared_prefix([CONTEXT, CONTEXT]) == 599
    assert shared_prefix([CONTEXT, [300, *CONTEXT]]) == 0
    assert shared_prefix([(*CONTEXT, *CONTEXT), (*CONTEXT, *CONTEXT[::-1])]) == 0  # half would be read densely


def test_interrupted_run_goes_on_at_the_last_finished_sample(model, samples, records, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "run.jsonl"
    asked, read = [], run_module._read

    def counted(model, prompt, contender, densities):
        asked.append(contender.name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return read(model, prompt, contender, densities)

    monkeypatch.setattr(run_module, "_read", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_answers(model, samples, [SPARSE, EQUAL], output=path, settings={"seed": 1})
    whole = path.read_text()
    path.write_text(whole + '{"task": "ask", "leng')  # as if the machine had stopped while it wrote
    seen = []
    again = evaluate_answers(model, samples, [SPARSE, EQUAL], output=path, settings={"seed": 1}, on_record=seen.append)
    assert asked == ["dense", "sparse", "a_shape", "dense", "dense", "sparse", "a_shape"]
    assert by_name(again) == by_name(records) == by_name(seen)
    assert path.read_text().startswith(whole)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["settings"]["seed"] == 1
    assert {"device", "jax", "commit"} <= lines[1]["environment"].keys()
    assert len([line for line in lines if "environment" in line]) == 1
    evaluate_answers(model, samples, [SPARSE, EQUAL], output=path, settings={"seed": 1})
    assert len(asked) == 7


def refusal(model, path, samples, contenders=(), seed=1):
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: ") as error:
        evaluate_answers(model, samples, contenders, output=path, settings={"seed": seed})
    return str(error.value).removeprefix(f"{path}: ")


def test_file_of_another_run_is_refused_by_what_differs(model, samples, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    evaluate_answers(model, samples[:1], [SPARSE], output=path, settings={"seed": 1})
    said = "it is the journal of an evaluation with other settings ({}): remove it, or name another file"
    assert refusal(model, path, samples[:1], [SPARSE], seed=2) == said.format("seed: 1 there, 2 here")
    assert refusal(model, path, samples[:1]) == said.format("contenders.sparse: something there, nothing here")
    other = dataclasses.replace(SPARSE, pattern=VerticalSlash(vertical_size=31, slash_size=50))
    assert "(contenders.sparse.pattern: " in refusal(model, path, samples[:1], [other])
    tiles = TileTable((TileEntry(device="cpu", implementation="xla", head_dim=8, dtype="float32", tiles=WIDE),))
    with monkeypatch.context() as patched:
        patched.setattr(model, "tiles", tiles)
        found = refusal(model, path, samples[:1], [SPARSE])
        assert found == said.format("contenders.sparse.tiles.block_q: 64 there, 128 here")
    with pytest.raises(ValueError, match="another prompt for ask, sample 0: give another file"):
        evaluate_answers(model, make_samples()[:1], [SPARSE], output=path, settings={"seed": 1})
    state = model._state
    monkeypatch.setattr(model, "_state", jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(0.5), state))
    assert re.fullmatch(
        re.escape(said.format("weights: W there, W here")).replace("W", "'[0-9a-f]{16}'"),
        refusal(model, path, samples[:1], [SPARSE]),
    )


@pytest.mark.parametrize(
    ("line", "change", "sentence"),
    [
        (0, "no json", 'without "format": "minference-jax/evaluation" in its first line it is not the journal of an'),
        (0, '{"settings": 3}', 'without "format"'),
        (0, {"version": 2}, "version 2 needs a newer minference-jax: this one reads 1"),
        (0, {"version": "1"}, "version '1' must be 1"),
        (0, {"more": 1}, "unknown field 'more'"),
        (1, {"environment": {"device": "x"}}, "line 2: missing field 'commit', 'date', 'driver', 'jax', 'jaxlib'"),
        (2, "{", "line 3: not JSON: "),
        (2, "[1]", "line 3: [1] must be an object"),
        (2, '{"task": NaN}', "line 3: not JSON: NaN is no number"),
        (2, "[" * 100_000, "line 3: the JSON is nested too deeply"),
        (2, {"task": None}, "line 3: task=None must be a text"),
        (2, {"extra": 1}, "line 3: unknown field 'extra'"),
        (2, {"score": 2}, "line 3: score=2 must be a number from 0 to 1"),
        (2, {"index": True}, "line 3: index=True must be an integer of at least 0"),
        (2, {"attention": "x"}, "line 3: attention='x' must be one of dense, sparse"),
        (3, {"attention": "dense"}, "line 4: ask, sample 0, of dense is there twice"),
    ],
)
def test_damaged_file_is_refused_in_a_sentence_and_left_alone(model, samples, whole, tmp_path, line, change, sentence):
    path, lines = tmp_path / "run.jsonl", whole.splitlines()
    lines[line] = change if isinstance(change, str) else json.dumps(json.loads(lines[line]) | change)
    path.write_text("\n".join(lines) + "\ntorn")
    assert refusal(model, path, samples[:1], [SPARSE]).startswith(sentence)
    assert path.read_text() == "\n".join(lines) + "\ntorn"


@pytest.fixture(scope="module")
def whole(model, samples, tmp_path_factory):
    """The file of a finished run."""
    path = tmp_path_factory.mktemp("whole") / "run.jsonl"
    evaluate_answers(model, samples[:1], [SPARSE], output=path, settings={"seed": 1})
    return path.read_text()


@pytest.mark.parametrize("content", ["", '{"format": "minference-ja', '{"format": "minference-jax/evaluation", "ver'])
def test_file_that_was_killed_before_its_first_line_is_begun_anew(model, samples, whole, tmp_path, content):
    (tmp_path / "run.jsonl").write_text(content)
    evaluate_answers(model, samples[:1], [SPARSE], output=tmp_path / "run.jsonl", settings={"seed": 1})
    assert (tmp_path / "run.jsonl").read_text() == whole


def test_any_answer_can_be_read_again(tmp_path):
    path, said = tmp_path / "run.jsonl", "\u2028 \x85 \x1e \n \ud55c \u00e9"  # some of them end lines for Python
    made = {"task": "a", "length": 1, "index": 0, "attention": "dense", "said": said, "pattern": None, "density": 1.0}
    made |= {"prompt": "x", "context": 0, "about": {}, "tokens": 1, "shared_tokens": 0, "answers": [], "score": 0.0}
    made |= {"metric": "is_word"}
    settings = {"contenders": {"dense": {}}}
    first = Journal(path, settings).append(made)
    assert Journal(path, settings).records == [first]
    assert first.items() > made.items()


def test_records_tell_where_they_were_made_whoever_sums_up(model, samples, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    places = [{"device": name, "driver": None, "jax": "1", "jaxlib": "1", "commit": None, "date": "d"} for name in "ab"]
    for place, count in zip(places, (1, 2), strict=True):
        monkeypatch.setattr(journal, "environment", lambda place=place: place)
        found = evaluate_answers(model, samples[:count], [], output=path)
    assert [record["environment"] for record in found] == places
    monkeypatch.undo()
    lines = path.read_text()
    again = evaluate_answers(model, samples[:2], [], output=path)
    assert again == found
    assert path.read_text() == lines  # nothing was made here
    (row,) = summarize(again)
    assert (row["device"], row["jax"], row["commit"]) == ("a and b", "1", None)


def test_weights_have_one_digest_each_however_they_are_held(model):
    whole = weights_digest(model.model)
    assert weights_digest(model.model) == whole
    flat = weights_digest(nnx.merge(model._graph, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), model._state)))
    assert flat == whole
    for change in (
        lambda x: x.astype(jnp.bfloat16),
        lambda x: jnp.flip(x, -1),
        lambda x: x.at[(-1,) * x.ndim].multiply(1 + 1e-6),
    ):
        assert weights_digest(nnx.merge(model._graph, jax.tree.map(change, model._state))) != whole


def test_prompt_without_room_for_its_answer_is_refused_before_it_is_read(model, samples):
    too_long = Sample(**vars(samples[0]) | {"prompt": (1,) * 2046})
    with pytest.raises(ValueError, match="need 2050 positions, the model has 2048"):
        evaluate_answers(model, [too_long], [])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attention": "auto"}, "attention='auto' of 'x' is not one of minference, dense"),
        ({"attention": "dense"}, "a contender needs a name, which is dense where its attention is"),
        ({"name": "dense"}, "a contender needs a name, which is dense where its attention is"),
        ({"name": ""}, "a contender needs a name"),
        ({"equal_cost_to": "y"}, "equal_cost_to goes with attention='a_shape' and no pattern"),
        ({"attention": "a_shape", "equal_cost_to": "y", "sink_size": 0}, "sink_size=0 must be at least 1"),
    ],
)
def test_contender_that_makes_no_sense_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Contender(**{"name": "x", **options})


def test_contenders_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"names of their own, got dense, sparse, sparse"):
        with_dense([SPARSE, SPARSE])
    for order in ([EQUAL, SPARSE], [EQUAL]):
        with pytest.raises(ValueError, match="a_shape is to cost as much as sparse, a sparse one that must come first"):
            with_dense(order)
    assert [one.name for one in with_dense([SPARSE, Contender(name="dense", attention="dense")])] == ["dense", "sparse"]


def test_settings_tell_patterns_apart(model):
    def settings(head):
        patterns = ModelPatterns(layers=((head, Dense(), Dense(), Dense()),) * 2, source="p.json")
        return Contender(name="p", pattern=patterns).settings(model)

    one, other = (settings(AShape(sink_size=1, window_size=size)) for size in (2, 3))
    assert one["pattern"] == other["pattern"] == "p.json"
    assert one["pattern_sha256"] != other["pattern_sha256"]
    assert json.loads(json.dumps(one)) == one


def test_what_cannot_run_is_refused_before_the_first_prefill(model, samples, monkeypatch):
    monkeypatch.setattr(model, "prefill", None)
    heads = ((Dense(),) * 4,) * 3
    three = Contender(name="three", pattern=ModelPatterns(layers=heads, source="p.json"))
    one = Contender(name="one", attention="a_shape", pattern=VerticalSlash(vertical_size=30, slash_size=50))
    same = dataclasses.replace(SPARSE, name="same")
    for contenders, sentence in (
        ([three], "three: p.json: patterns for 3 layers of 4 heads do not fit"),
        ([one], r"one: attention='a_shape' needs pattern=AShape"),
        ([dataclasses.replace(SPARSE, implementation="abacus")], "is not one of"),
        ([SPARSE, same], "sparse and same are the same attention: leave one of them out"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate_answers(model, samples, contenders)
    with pytest.raises(NotImplementedError):
        evaluate_answers(model, samples, [dataclasses.replace(SPARSE, implementation="triton")])

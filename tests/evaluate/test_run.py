"""Questions asked with several attentions: dense beside each, contexts shared, runs that go on."""

import json

import numpy as np
import pytest

from minference_jax import AShape, Dense, ModelPatterns, VerticalSlash
from minference_jax.evaluate import Contender, equal_cost_a_shape, evaluate_answers, summarize, table
from minference_jax.evaluate import run as run_module
from minference_jax.evaluate.contenders import with_dense
from minference_jax.evaluate.journal import Journal
from minference_jax.evaluate.run import shared_prefix
from minference_jax.evaluate.samples import Sample

SPARSE = Contender(name="sparse", attention="vertical_slash", pattern=VerticalSlash(vertical_size=30, slash_size=50))
EQUAL = Contender(name="a_shape", attention="a_shape", equal_cost_to="sparse", sink_size=16)
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
    told = []
    again = evaluate_answers(model, samples, [SPARSE, EQUAL], output=path, settings={"seed": 1}, told=told.append)
    assert asked == ["dense", "sparse", "a_shape", "dense", "dense", "sparse", "a_shape"]
    assert by_name(again) == by_name(records) == by_name(told)
    assert path.read_text().startswith(whole)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["settings"]["seed"] == 1
    assert {"device", "jax", "commit"} <= lines[1]["environment"].keys()
    assert len([line for line in lines if "environment" in line]) == 1
    evaluate_answers(model, samples, [SPARSE, EQUAL], output=path, settings={"seed": 1})
    assert len(asked) == 7


def test_file_of_another_run_is_refused(model, samples, tmp_path):
    path = tmp_path / "run.jsonl"
    evaluate_answers(model, samples[:1], [], output=path, settings={"seed": 1})
    with pytest.raises(ValueError, match=r"was made with seed=1, this run has 2: give another file"):
        evaluate_answers(model, samples[:1], [], output=path, settings={"seed": 2})
    with pytest.raises(ValueError, match="was made with contenders="):
        evaluate_answers(model, samples[:1], [SPARSE], output=path, settings={"seed": 1})
    with pytest.raises(ValueError, match="another prompt for ask, sample 0"):
        evaluate_answers(model, make_samples()[:1], [], output=path, settings={"seed": 1})
    for content in ("no json\n", "[]\n", '{"a": 1}\n', '{"settings": 3}\n', "torn"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"run\.jsonl is no file of an evaluation"):
            evaluate_answers(model, samples[:1], [], output=path)
        assert path.read_text() == content


def test_any_answer_can_be_read_again(tmp_path):
    path, said = tmp_path / "run.jsonl", "\u2028 \x85 \x1e \n \ud55c \u00e9"  # some of them end lines for Python
    made = {"task": "a", "length": 1, "index": 0, "attention": "dense", "said": said}
    Journal(path, {}).append(made)
    assert Journal(path, {}).records == [made]


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
    with pytest.raises(ValueError, match="names of their own, got dense, sparse, sparse"):
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
    assert one["digest"] != other["digest"]
    assert json.loads(json.dumps(one)) == one


def record(task, index, attention, score, density=0.5, **more):
    made = {"task": task, "length": 700, "index": index, "context": index, "attention": attention, "score": score}
    return (
        made | {"density": 1.0 if attention == "dense" else density, "pattern": None, "metric": "m", "about": {}} | more
    )


def test_summary_compares_with_dense_on_the_same_samples():
    scores = {"dense": [1, 1, 0, 1], "sparse": [1, 0, 1, 0]}
    found = [record("a", i, name, score) for name, row in scores.items() for i, score in enumerate(row)]
    found += [record("b", i, name, score / 2) for name, row in scores.items() for i, score in enumerate(row)]
    found.append(record("a", 9, "sparse", 1))  # not asked dense yet
    rows = {(row["task"], row["attention"]): row for row in summarize(found)}
    assert set(rows) == {(task, name) for task in ("a", "b") for name in ("dense", "sparse")}
    sparse = rows["a", "sparse"]
    assert (sparse["value"], sparse["samples"], sparse["lost"], sparse["gained"]) == (0.5, 4, 2, 1)
    assert sparse["difference"] == -0.25
    assert (sparse["interval"], rows["b", "sparse"]["interval"]) == ("wilson", "bootstrap")
    assert sparse["difference_low"] <= -0.25 <= sparse["difference_high"]
    assert rows["a", "dense"]["difference"] is None
    halved = [one | {"score": 0} if one["attention"] == "sparse" else one for one in found if one["task"] == "b"]
    assert {row["interval"] for row in summarize(halved)} == {"bootstrap"}  # one kind for a task, whoever scores 0
    together = {row["attention"]: row for row in summarize(found[:-1]) if row["task"] == "all"}
    assert together["dense"]["value"] == pytest.approx((0.75 + 0.375) / 2)
    text = table(summarize(found))
    assert text.splitlines()[0].split()[:3] == ["task", "tokens", "attention"]
    assert "2 / 1" in text

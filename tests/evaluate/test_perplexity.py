"""Likelihoods of a text: scored in chunks as all at once, by position, and summed up."""

import math

import jax
import numpy as np
import pytest

from minference_jax import AShape
from minference_jax.cache import init_cache
from minference_jax.evaluate import Contender, evaluate_perplexity, perplexity, summarize, table

NARROW = Contender(name="narrow", attention="a_shape", pattern=AShape(sink_size=4, window_size=64))


@pytest.fixture(scope="module")
def records(model, prose):
    return evaluate_perplexity(model, prose, [500, 510], [NARROW], excerpts=2, steps=4)


def test_scores_are_those_of_all_logits_at_once(model, prose):
    tokens = model.encode(prose)[:500]
    found = model.score(tokens, attention="dense")
    config = model.config
    cache = init_cache(config.num_layers, 1, 500, config.num_kv_heads, config.head_dim, model.model.dtype)
    read = jax.jit(lambda tokens, cache: model.model(tokens, cache, logits="all")[0])
    logits = read(np.asarray([tokens], np.int32), cache)
    expected = jax.nn.log_softmax(logits[0, :-1], axis=-1)[np.arange(499), np.asarray(tokens[1:])]
    np.testing.assert_allclose(found.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert found.greedy.tolist() == (logits[0, :-1].argmax(axis=-1) == np.asarray(tokens[1:])).tolist()
    assert found.density is None
    assert model.score(tokens, **options(NARROW)).density.shape == (config.num_layers, config.num_heads)


def options(contender):
    return {"attention": contender.attention, "pattern": contender.pattern}


def test_attention_that_keeps_everything_scores_as_dense(model, prose):
    tokens = model.encode(prose)[:500]
    wide = AShape(sink_size=4, window_size=500)
    dense, same = model.score(tokens, attention="dense"), model.score(tokens, attention="a_shape", pattern=wide)
    np.testing.assert_allclose(same.log_probs, dense.log_probs, rtol=1e-3, atol=1e-3)


def test_likelihoods_are_summed_by_position(model, prose, records):
    assert [(r["length"], r["index"], r["attention"]) for r in records[:4]] == [
        (500, 0, "dense"),
        (500, 0, "narrow"),
        (500, 1, "dense"),
        (500, 1, "narrow"),
    ]
    tokens = model.encode(prose)[500:1000]
    nll = -model.score(tokens, **options(NARROW)).log_probs.astype(np.float64)
    dense = -model.score(tokens, attention="dense").log_probs.astype(np.float64)
    record = records[3]
    assert record["ends"] == [124, 249, 374, 499]
    starts = [0, 124, 249, 374]
    for i, (start, end) in enumerate(zip(starts, record["ends"], strict=True)):
        assert record["counts"][i] == end - start
        assert record["nll"][i] == pytest.approx(nll[start:end].sum())
        assert record["nll_squares"][i] == pytest.approx((nll[start:end] ** 2).sum())
        assert record["above"][i] == pytest.approx((nll - dense)[start:end].sum(), abs=1e-3)
    assert abs(nll - dense)[:60].max() < 1e-3  # its window reaches so far
    assert abs(nll - dense)[200:].max() > 0.1
    assert records[2]["above"] is None


def test_perplexity_has_its_standard_error(model, prose, records):
    rows = summarize(records, 0.9)
    whole = {(row["length"], row["attention"]): row for row in rows if row["positions"] is None}
    values = np.concatenate(
        [-model.score(model.encode(prose)[i * 500 : (i + 1) * 500], attention="dense").log_probs for i in (0, 1)]
    ).astype(np.float64)
    row = whole[500, "dense"]
    reach = 1.6449 * values.std(ddof=1) / math.sqrt(998)
    assert row["samples"] == 998
    assert math.log(row["value"]) == pytest.approx(values.mean(), rel=1e-5)
    assert math.log(row["high"]) - math.log(row["value"]) == pytest.approx(reach, rel=1e-3)
    narrow = whole[500, "narrow"]
    assert narrow["difference"] == pytest.approx(math.log(narrow["value"]) - math.log(row["value"]), rel=1e-5)
    assert narrow["difference_low"] < narrow["difference"] < narrow["difference_high"]
    assert [row["positions"] for row in rows[1:5]] == [[1, 125], [125, 250], [250, 375], [375, 500]]
    assert len(table(rows).splitlines()) == 5


def test_interrupted_run_reads_dense_again_where_others_are_missing(model, prose, records, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    arguments = (model, prose, [500, 510], [NARROW])
    assert evaluate_perplexity(*arguments, excerpts=2, steps=4, output=path) == records
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # the last is the narrow one's
    reads, score = [], model.score
    monkeypatch.setattr(model, "score", lambda tokens, **how: reads.append(how["attention"]) or score(tokens, **how))
    assert evaluate_perplexity(*arguments, excerpts=2, steps=4, output=path) == records
    assert reads == ["dense", "a_shape"]
    assert path.read_text().splitlines(keepends=True) == lines
    with pytest.raises(ValueError, match=r"an evaluation with other settings \(steps: 4 there, 2 here\)"):
        evaluate_perplexity(*arguments, excerpts=2, steps=2, output=path)
    path.write_text(path.read_text().replace('"counts": [', '"counts": [1, '))
    with pytest.raises(ValueError, match=r"line 3: counts=\[1, .* must be a list of 4 entries, each an integer"):
        evaluate_perplexity(*arguments, excerpts=2, steps=4, output=path)
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match="another text for excerpt 0 of 500 tokens"):
        evaluate_perplexity(model, prose[1:], [500], [NARROW], steps=4, output=path)


@pytest.mark.parametrize(
    ("lengths", "more", "sentence"),
    [
        ([4], {}, "an excerpt of 4 tokens has no room for steps=8"),
        ([500], {"excerpts": 20}, r"the text has \d+ tokens, 20 excerpts of 500 need 10000"),
        ([500], {"steps": 0}, "steps=0 must be an integer of at least 1"),
        ([500, 4000], {}, "length=4000 is beyond the model's context of 2048 tokens"),
    ],
)
def test_text_that_cannot_be_scored_is_refused(model, prose, lengths, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate_perplexity(model, prose, lengths, [], **more)


def test_one_token_has_nothing_to_score(model):
    with pytest.raises(ValueError, match="score needs at least two"):
        model.score([1], attention="dense")


def test_task_has_a_name_of_its_own(records):
    assert {record["task"] for record in records} == {perplexity.TASK}

"""Scores of single answers, and the intervals of many."""

import math

import numpy as np
import pytest

from minference_jax.evaluate.metrics import METRICS
from minference_jax.evaluate.statistics import mean_of_means, mean_score, paired_difference, quantile


@pytest.mark.parametrize(
    ("metric", "said", "answers", "score"),
    [
        ("contains_all", "It is ABC, and 12.", ["abc", "34"], 0.5),
        ("contains_any", "It is ABC.", ["x", "abc"], 1),
        ("contains_any", "It is ABC.", ["x"], 0),
        ("first_integer", "The key is 123. Not 45.", ["123"], 1),
        ("first_integer", "The key is 45, then 123", ["123"], 0),
        ("first_integer", "none", ["123"], 0),
        ("is_word", 'It is "ab-12".', ["ab-12"], 1),
        ("is_word", "It is xab-12", ["ab-12"], 0),
        ("is_word", "Theab-12</s>To", ["ab-12"], 1),
        ("first_number", "about 3.5 or 4", [3.5], 1),
        ("first_number", "7 is it", [7], 1),
        ("first_number", "7.9 is it", [7], 1),
        ("first_number", "7.9 is it", [7.5], 0),
        ("first_number", "7 is it", [7.0], 1),
        ("first_number", "9" * 400, [7], 0),
        ("first_number", "no", [7], 0),
        ("leading_integers", "[1, 4, 9, 3]", [1, 4, 8, 3], 0.5),
        ("leading_integers", "[1, 4", [1, 4, 8, 3], 0.5),
        ("last_integer", "so the value is -7.", [-7], 1),
        ("last_integer", "-7 or so", [-7], 0),
        ("last_integer", "", [-7], 0),
        ("is_name", "It is Ann.", ["ANN"], 1),
        ("is_name", "It is Hannah.", ["ANN"], 0),
        ("choice", "B. Bob", ["Bob", "B"], 1),
        ("choice", "Bob", ["Bob", "B"], 1),
        ("choice", "I say the answer is: B", ["Bob", "B"], 1),
        ("choice", "I say the answer is C", ["Bob", "B"], 0),
        ("choice", "", ["Bob", "B"], 0),
        ("code_choice", "B. run", ["run", "B"], 1),
        ("code_choice", "The answer is: run", ["run", "B"], 1),
        ("code_choice", "The answer is: C", ["run", "B"], 0),
        ("code_choice", "perhaps B", ["run", "B"], 0),
        ("f1_words", "The red, big dog!", ["a big dog", "cat"], 0.8),
        ("f1_words", "", ["a big dog"], 0),
        ("f1_signs", "安娜。", ["安"], 2 / 3),
        ("f1_signs", "\u300a安\u300b", ["安"], 2 / 3),  # the published list has the closing bracket alone
        ("choice", "perhaps AB", ["Bob", "B"], 0),
    ],
)
def test_answer_is_scored(metric, said, answers, score):
    assert METRICS[metric](said, answers) == pytest.approx(score)


def test_summary_is_scored_by_rouge_where_it_is_installed():
    pytest.importorskip("rouge_score")
    assert METRICS["rouge_l_sum"]("A big dog ran.", ["A big dog ran."]) == 1
    assert 0 < METRICS["rouge_l_sum"]("A dog.", ["A big dog ran."]) < 1
    assert METRICS["rouge_l_sum"]("A big dog ran.", ["No.", "A big dog ran."]) == 1


def test_summary_asks_for_the_package_that_scores_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"pip install 'minference-jax\[evaluate\]'"):
        METRICS["rouge_l_sum"]("a", ["a"])


def test_wilson_interval_solves_its_equation():
    """Its ends are the shares from which the one seen is just so far away as the quantile says."""
    for successes, count in ((0, 5), (3, 10), (10, 10)):
        found = mean_score([1] * successes + [0] * (count - successes), range(count), 0.9)
        assert found.kind == "wilson"
        assert found.value == successes / count
        for end in (found.low, found.high):
            if 0 < end < 1:
                deviation = math.sqrt(end * (1 - end) / count)
                assert abs(found.value - end) == pytest.approx(quantile(0.9) * deviation)
    assert mean_score([1, 1], range(2)).low > 0.3
    assert mean_score([0, 0], range(2)).high < 0.7


def test_shares_and_shared_contexts_have_the_bootstraps_interval():
    scores = [0.2, 0.4, 1.0, 0.6] * 10
    found = mean_score(scores, range(40))
    assert found.kind == "bootstrap"
    error = np.std(scores, ddof=1) / math.sqrt(40)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.02)
    alone, shared = mean_score([0, 1] * 20, range(40)), mean_score([0, 1] * 20, [i % 2 for i in range(40)])
    assert (alone.kind, shared.kind) == ("wilson", "bootstrap")
    assert (shared.low, shared.high) == (0, 1)  # but two contexts, however many questions


def test_paired_difference_sees_only_what_differs():
    dense = [0, 1] * 50
    assert paired_difference(dense, dense, range(100))[:3] == (0, 0, 0)
    worse = [0, 0, *dense[2:]]
    found = paired_difference(worse, dense, range(100))
    assert found.value == pytest.approx(-0.01)
    assert found.low < found.value < found.high <= 0
    assert found == paired_difference(worse, dense, range(100))  # the same draws


@pytest.mark.parametrize("confidence", [0, 1, 2, -0.5, math.nan])
def test_confidence_that_is_none_is_refused(confidence):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        mean_score([1.0], [0], confidence)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        paired_difference([1.0], [1.0], [0], confidence)


def test_mean_of_means_draws_in_every_group_by_itself():
    found = mean_of_means([([1] * 30, range(30)), ([0] * 5, range(5))])
    assert found == (0.5, 0.5, 0.5, "stratified bootstrap")
    scores = [0, 1] * 50
    one, four = mean_of_means([(scores, range(100))]), mean_of_means([(scores, range(100))] * 4)
    assert one[:3] == paired_difference(scores, [0] * 100, range(100))[:3]
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.05)


def test_nothing_to_average_is_refused():
    for groups in ([], [([1.0], [0]), ([], [])]):
        with pytest.raises(ValueError, match="at least one group, and a value in each"):
            mean_of_means(groups)
    with pytest.raises(ValueError, match="at least one score"):
        mean_score([], [])
    with pytest.raises(ValueError, match="pair by pair"):
        paired_difference([1.0], [], [0])

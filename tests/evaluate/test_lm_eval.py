"""The adapter for lm-eval: its own requests give the model's own answers and likelihoods."""

import sys

import numpy as np
import pytest

from minference_jax import AShape
from minference_jax.evaluate import Contender, lm_eval_adapter

NARROW = Contender(name="narrow", attention="a_shape", pattern=AShape(sink_size=4, window_size=64))
TEXT = "It rained for nine days in the year nine. " * 4


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def adapter(lm_eval, model):
    return lm_eval_adapter.MinferenceLM(model, NARROW)


def request(lm_eval, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)


def test_adapter_asks_for_its_package(monkeypatch):
    lm_eval_adapter._adapter.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install 'minference-jax\[lm-eval\]'"):
        lm_eval_adapter.MinferenceLM  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        lm_eval_adapter.Nothing  # noqa: B018


def test_adapter_is_a_model_of_lm_eval(lm_eval, adapter, model):
    from lm_eval.api.model import LM

    assert isinstance(adapter, LM)
    assert adapter.tok_encode(TEXT) == model.encode(TEXT)
    assert adapter.apply_chat_template([{"role": "user", "content": "a"}]) == "[user] a>"


def test_likelihood_is_that_of_the_continuation(lm_eval, adapter, model):
    ((found, is_greedy),) = adapter.loglikelihood([request(lm_eval, TEXT, " And then.")], disable_tqdm=True)
    # lm-eval counts the context's last space to the continuation
    scores = model.score(model.encode(TEXT + " And then."), attention="a_shape", pattern=NARROW.pattern)
    assert found == pytest.approx(scores.log_probs[-11:].sum(), rel=1e-5)
    assert is_greedy == bool(scores.greedy[-11:].all())
    assert adapter.densities[-1] == pytest.approx(float(np.mean(scores.density)))


def test_rolling_likelihood_predicts_every_token(lm_eval, adapter, model):
    (found,) = adapter.loglikelihood_rolling([request(lm_eval, TEXT)])
    tokens = [model.tokenizer.eos_token_id, *model.encode(TEXT)]
    assert found == pytest.approx(
        model.score(tokens, attention="a_shape", pattern=NARROW.pattern).log_probs.sum(), rel=1e-5
    )


def test_answer_ends_before_a_stop_text(lm_eval, adapter, model):
    (whole,) = adapter.generate_until([request(lm_eval, TEXT, {"max_gen_toks": 12})])
    (expected,) = model.generate(TEXT, attention="a_shape", pattern=NARROW.pattern, max_new_tokens=12)
    assert whole == expected.text
    stop = whole[3]
    (cut,) = adapter.generate_until([request(lm_eval, TEXT, {"max_gen_toks": 12, "until": [stop]})])
    assert cut == whole.partition(stop)[0]


def test_what_the_adapter_cannot_do_is_refused(lm_eval, adapter, model):
    with pytest.raises(ValueError, match="answers are greedy"):
        adapter.generate_until([request(lm_eval, TEXT, {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(ValueError, match="need 2305 positions, the model has 2048"):
        adapter.generate_until([request(lm_eval, "x" * 2049, {})])
    equal = Contender(name="a", attention="a_shape", equal_cost_to="b")
    with pytest.raises(ValueError, match="a is to cost as much as another"):
        lm_eval_adapter.MinferenceLM(model, equal)

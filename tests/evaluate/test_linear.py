"""What 8-bit linear layers cost, against the same numbers made the plain way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax import cli
from minference_jax.evaluate import linear, linear_errors
from minference_jax.generate import LanguageModel
from minference_jax.models import quantize_linear
from minference_jax.models.fp8 import Fp8Linear, quantize_kernel

LENGTH = 60


@pytest.fixture(scope="module")
def tokens(model, prose):
    return model.encode(prose)[:LENGTH]


@pytest.fixture(scope="module")
def errors(model, tokens):
    return linear_errors(model, tokens)


def test_errors_of_products_are_of_what_the_exact_model_computes_there(model, tokens, errors):
    layers = model.model.layers
    assert len(errors.products) == 7
    assert {error.shape for error in errors.products.values()} == {(model.config.num_layers,)}
    x = model.model.embed(jnp.asarray(tokens))
    x = np.asarray(x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + model.config.rms_norm_eps))
    kernel = layers.attention.q_proj.kernel[...][0]
    exact, fast = x @ kernel, Fp8Linear(*quantize_kernel(kernel))(jnp.asarray(x))
    expected = np.linalg.norm(fast - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(errors.products["attention.q_proj"][0], expected, rtol=1e-3)
    for error in errors.products.values():
        assert ((error > 0.005) & (error < 0.1)).all()


def test_likelihoods_and_logits_are_those_of_the_quantised_model(model, tokens, errors):
    fast = LanguageModel(quantize_linear(model.model))
    exact_scores, scores = (one.score(tokens, attention="dense") for one in (model, fast))
    assert errors.tokens == LENGTH
    assert errors.exact_perplexity == pytest.approx(np.exp(-exact_scores.log_probs.mean()), rel=1e-5)
    assert errors.perplexity == pytest.approx(np.exp(-scores.log_probs.mean()), rel=1e-5)
    assert errors.greedy == np.mean(exact_scores.greedy == scores.greedy)
    assert 0 < errors.nll_error < 1
    assert 0 < errors.logits < 1


def test_what_can_not_be_compared_is_refused(model, tokens, monkeypatch):
    with pytest.raises(ValueError, match="given 1 tokens, it needs from 2"):
        linear_errors(model, tokens[:1])
    monkeypatch.setattr(linear, "TOKENS_AT_ONCE", 32)
    with pytest.raises(ValueError, match="given 60 tokens, it needs from 2 to 32"):
        linear_errors(model, tokens)
    with pytest.raises(ValueError, match="are fp8 already"):
        linear_errors(LanguageModel(quantize_linear(model.model)), tokens[:20])


def test_the_command_prints_a_table_or_json(folder, prose, errors, tmp_path, capsys):
    (tmp_path / "prose.txt").write_text(prose)
    command = ["evaluate", "linear", "--model", str(folder), "--text", str(tmp_path / "prose.txt")]
    assert cli.main([*command, "--length", str(LENGTH), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["linear"], facts["tokens"], facts["jax"]) == ("fp8", LENGTH, jax.__version__)
    assert facts["perplexity"] == pytest.approx(errors.perplexity)
    assert facts["products"]["mlp.up_proj"] == pytest.approx(errors.products["mlp.up_proj"].tolist())
    assert cli.main([*command, "--length", str(LENGTH)]) == 0
    said = capsys.readouterr().out
    assert f"perplexity {errors.exact_perplexity:.3f} -> {errors.perplexity:.3f}" in said
    assert "mlp.down_proj" in said
    assert cli.main([*command, "--length", "9999999"]) == 2
    assert "needs more" in capsys.readouterr().err

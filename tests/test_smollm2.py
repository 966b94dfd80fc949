"""SmolLM2-135M-Instruct, the default model: real weights, converted by us, against PyTorch on a real prompt."""

import glm_embedding
import numpy as np
import pytest
from goldens import smollm2

import minference_jax
from minference_jax.models import Glm, parameters_of

LOGITS_RELATIVE = 1e-4  # float32 sums in another order, over thirty layers; measured 4e-6

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.optimized]


@pytest.fixture(scope="module")
def model():
    try:
        return minference_jax.load()
    except ValueError as error:
        if "can't be downloaded" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def glm_folder(model, tmp_path_factory):
    parameters = {name: np.asarray(array) for name, array in parameters_of(model.model).items()}
    return glm_embedding.write_glm_folder(tmp_path_factory.mktemp("glm"), model.config, parameters, model.tokenizer)


@pytest.fixture(scope="module")
def glm(glm_folder):
    return minference_jax.load(glm_folder)


@pytest.fixture(scope="module")
def dense(model):
    return model.prefill(smollm2.read_golden()["prompt"], attention="dense")


def test_prompt_is_encoded_as_transformers_does_it(model):
    assert model.encode_chat(smollm2.question()) == smollm2.read_golden()["prompt"]


def test_last_logits_equal_the_committed_ones_of_pytorch(dense):
    golden, logits = smollm2.read_golden(), np.asarray(dense.logits[0])
    largest = golden["top"][0][1]
    for part in ("top", "sample"):
        ids, expected = zip(*golden[part], strict=True)
        assert np.abs(logits[list(ids)] - np.array(expected)).max() <= LOGITS_RELATIVE * largest
    assert logits.argmax() == golden["top"][0][0]


def test_greedy_tokens_equal_the_committed_ones_of_pytorch(model, dense):
    (answer,) = model.complete(dense, max_new_tokens=smollm2.NEW_TOKENS, stop_tokens=[])
    assert list(answer.tokens) == smollm2.read_golden()["tokens"]


def test_logits_and_greedy_tokens_equal_live_pytorch(model, dense):
    pytest.importorskip("torch", reason="the live comparison needs torch: pip install torch")
    from goldens import reference

    parameters = {name: np.asarray(array) for name, array in parameters_of(model.model).items()}
    prompt = np.array(smollm2.read_golden()["prompt"])[:-300]  # another prompt than the committed numbers have
    theirs, expected = reference.logits_and_greedy(reference.build(model.config, parameters), prompt, 16)
    prefilled = model.prefill(prompt, attention="dense")
    error = np.abs(prefilled.logits[0] - theirs[-1]).max() / np.abs(theirs[-1]).max()
    assert error <= LOGITS_RELATIVE
    (answer,) = model.complete(prefilled, max_new_tokens=16, stop_tokens=[])
    assert list(answer.tokens) == expected


def test_minference_with_patterns_that_keep_everything_answers_as_dense(model, dense):
    golden = smollm2.read_golden()
    kept = minference_jax.VerticalSlash(vertical_size=2048, slash_size=2048)
    sparse = model.prefill(golden["prompt"], attention="vertical_slash", pattern=kept)
    assert np.abs(sparse.logits - dense.logits).max() <= LOGITS_RELATIVE * golden["top"][0][1]
    (answer,) = model.complete(sparse, max_new_tokens=16, stop_tokens=[])
    assert list(answer.tokens) == golden["tokens"][:16]


def test_the_same_weights_in_the_layout_of_glm_give_the_committed_logits_and_tokens(glm):
    golden = smollm2.read_golden()
    assert isinstance(glm.model, Glm)
    everything = minference_jax.VerticalSlash(vertical_size=2048, slash_size=2048)
    for attention, pattern in (("dense", None), ("vertical_slash", everything)):
        prefilled = glm.prefill(golden["prompt"], attention=attention, pattern=pattern)
        logits = np.asarray(prefilled.logits[0])
        ids, expected = zip(*(golden["top"] + golden["sample"]), strict=True)
        assert np.abs(logits[list(ids)] - np.array(expected)).max() <= LOGITS_RELATIVE * golden["top"][0][1]
        (answer,) = glm.complete(prefilled, max_new_tokens=16, stop_tokens=[])
        assert list(answer.tokens) == golden["tokens"][:16]


def test_that_folder_gives_the_same_logits_in_pytorchs_glm(glm, glm_folder):
    torch = pytest.importorskip("torch", reason="the live comparison needs torch: pip install torch")
    from transformers import AutoModelForCausalLM

    prompt = np.array(smollm2.read_golden()["prompt"])[:-300]
    model = AutoModelForCausalLM.from_pretrained(glm_folder, dtype=torch.float32)
    assert type(model).__name__ == "GlmForCausalLM"
    with torch.no_grad():
        theirs = model(torch.tensor(prompt, dtype=torch.long)[None]).logits[0, -1].numpy()
    ours = np.asarray(glm.prefill(prompt, attention="dense").logits[0])
    assert np.abs(ours - theirs).max() <= LOGITS_RELATIVE * np.abs(theirs).max()

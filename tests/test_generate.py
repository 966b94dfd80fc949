"""Prefill, decoding, sampling and text, on tiny models and a tokenizer whose every token is one byte."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from goldens import families, tiny_models

from minference_jax.generate import ATTENTION_NAMES, LanguageModel, bucket_length
from minference_jax.generate.sampling import Sampling, choose
from minference_jax.generate.streaming import TextPieces
from minference_jax.models import Llama, from_parameters
from minference_jax.patterns import AShape, BlockSparse, Dense, ModelPatterns, VerticalSlash, uniform_patterns

PROMPT = tiny_models.tiny_prompt(tiny_models.CASES["default_untied"])
LONG_PROMPT = np.random.default_rng(11).integers(0, 61, 127).astype(np.int32)
UNIFORM = {
    "a_shape": AShape(sink_size=4, window_size=8),
    "vertical_slash": VerticalSlash(vertical_size=4, slash_size=4),
    "block_sparse": BlockSparse(num_blocks=1),
}


def language_model(name="default_untied", **options):
    config = tiny_models.CASES[name]
    return LanguageModel(from_parameters(config, tiny_models.tiny_parameters(config)), **options)


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def byte_tokenizer():
    return small_models.byte_tokenizer()


@pytest.fixture
def traces(monkeypatch):
    """How often the model was traced: Python runs it once per compiled program."""
    shapes, call = [], Llama.__call__
    jax.clear_caches()  # programs of other tests would hide a trace

    def counted(self, tokens, cache, **options):
        shapes.append((*tokens.shape, getattr(cache, "capacity", 0)))  # 0: the cache is made of these tokens
        return call(self, tokens, cache, **options)

    monkeypatch.setattr(Llama, "__call__", counted)
    return shapes


def greedy(model, prompts, **options):
    return [list(row.tokens) for row in model.generate(prompts, **options)]


def test_one_program_is_compiled_per_bucket(traces):
    reader = language_model("linear")
    for length in (1, 5, 24, 100, 127):
        reader.prefill(LONG_PROMPT[:length], attention="dense")
    assert traces == [(1, 128, 0)]


def test_other_patterns_and_weights_run_the_same_program(traces):
    reader = language_model("linear")
    config = reader.config
    mixed = ModelPatterns(layers=((*UNIFORM.values(), Dense()),) * config.num_layers, source="a test")
    turned = ModelPatterns(layers=(mixed.layers[0][::-1],) * config.num_layers, source="a test")
    densities = [reader.prefill(LONG_PROMPT, pattern=pattern).density for pattern in (turned, mixed)]
    zeros = {name: 0 * array for name, array in tiny_models.tiny_parameters(config).items()}
    result = LanguageModel(from_parameters(config, zeros), patterns=mixed).prefill(LONG_PROMPT)
    assert len(traces) == 1
    assert not np.array_equal(densities[0], densities[1])
    assert not result.logits.any()


def test_one_decoding_program_serves_all_steps(traces):
    reader = language_model("linear")
    reader.generate(PROMPT, attention="dense", max_new_tokens=30)
    assert traces == [(1, 128, 0), (1, 1, 256)]


def test_greedy_tokens_equal_those_of_pytorch(model):
    _, expected = tiny_models.read_golden("default_untied")
    assert greedy(model, PROMPT, attention="dense", max_new_tokens=64) == [expected]


def test_minference_answers_as_dense_where_its_patterns_keep_everything(model):
    _, expected = tiny_models.read_golden("default_untied")
    assert greedy(model, PROMPT, attention="minference", max_new_tokens=64) == [expected]


def test_dynamic_rope_reads_beyond_the_context_it_stretches():
    _, expected = tiny_models.read_golden("dynamic_crossing")
    stretched = language_model("dynamic_crossing")
    assert greedy(stretched, PROMPT, attention="dense", max_new_tokens=64) == [expected]


def test_unequal_prompts_are_answered_as_if_alone(model):
    prompts = [PROMPT, PROMPT[:5], PROMPT[3:17]]
    together = greedy(model, prompts, attention="dense", max_new_tokens=8)
    alone = [greedy(model, prompt, attention="dense", max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone


def test_buckets_are_powers_of_two_with_quarter_steps():
    buckets = sorted({bucket_length(length) for length in range(1, 1025)})
    assert buckets == [128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert all(bucket_length(bucket) == bucket for bucket in buckets)
    assert bucket_length(5121) == 6144
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        bucket_length(0)


@pytest.mark.parametrize("attention", UNIFORM)
def test_uniform_attention_is_what_patterns_of_the_same_heads_give(model, attention):
    patterns = uniform_patterns(model.config.num_layers, model.config.num_heads, UNIFORM[attention])
    uniform = model.prefill(LONG_PROMPT, attention=attention, pattern=UNIFORM[attention])
    by_head = model.prefill(LONG_PROMPT, attention="minference", pattern=patterns)
    np.testing.assert_array_equal(uniform.logits, by_head.logits)


def test_sparse_prefill_tells_density_of_every_layer_row_and_head(model):
    result = model.prefill([LONG_PROMPT, PROMPT], attention="a_shape", pattern=UNIFORM["a_shape"])
    assert result.density.shape == (3, 2, 4)
    assert np.all(result.density > 0)
    assert model.prefill(PROMPT, attention="dense").density is None


def test_sparse_prefill_differs_from_dense_where_it_leaves_keys_out(model):
    dense = model.prefill(LONG_PROMPT, attention="dense").logits
    sparse = model.prefill(LONG_PROMPT, attention="a_shape", pattern=AShape(sink_size=1, window_size=2)).logits
    assert np.abs(dense - sparse).max() > 0.1


def test_decoding_leaves_the_prefill_usable(model):
    prefilled = model.prefill(LONG_PROMPT[:80], attention="dense")
    first = model.complete(prefilled, max_new_tokens=5)
    assert model.complete(prefilled, max_new_tokens=5) == first
    assert int(prefilled.cache.length[0]) == 80


def test_stop_token_ends_an_answer_and_is_not_part_of_it():
    _, expected = tiny_models.read_golden("default_untied")
    stop = expected[4]
    stopping = language_model(stop_tokens=[stop])
    (answer,) = stopping.generate(PROMPT, attention="dense", max_new_tokens=30)
    assert answer.finish_reason == "stop"
    assert list(answer.tokens) == expected[: expected.index(stop)]
    (longer,) = stopping.generate(PROMPT, attention="dense", max_new_tokens=6, stop_tokens=[])
    assert (longer.finish_reason, list(longer.tokens)) == ("length", expected[:6])


def test_rows_of_a_batch_stop_each_on_their_own(model):
    free = greedy(model, [PROMPT, PROMPT[:5]], attention="dense", max_new_tokens=12)
    stop = next(token for token in free[0] if token not in free[1])
    answers = model.generate([PROMPT, PROMPT[:5]], attention="dense", max_new_tokens=12, stop_tokens=[stop])
    assert [answer.finish_reason for answer in answers] == ["stop", "length"]
    assert list(answers[1].tokens) == free[1]


def test_same_key_draws_the_same_tokens_and_another_key_others(model):
    options = {"attention": "dense", "max_new_tokens": 20, "temperature": 1.5}
    first, same, other = (greedy(model, PROMPT, key=jax.random.key(seed), **options) for seed in (0, 0, 1))
    assert first == same
    assert first != other


def test_no_key_is_used_twice(model):
    with jax.debug_key_reuse(True):
        drawn = greedy(model, PROMPT, attention="dense", max_new_tokens=4, temperature=1.0, key=jax.random.key(5))
    assert len(drawn[0]) == 4


def test_drawn_tokens_follow_their_probabilities():
    logits = jnp.log(jnp.tile(jnp.array([0.5, 0.3, 0.15, 0.05]), (4000, 1)))

    def shares(**options):
        tokens, _ = choose(logits, Sampling(**options), jax.random.key(0))
        return np.bincount(tokens, minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.04)  # five deviations
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.01), [1, 0, 0, 0])
    squared = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    np.testing.assert_allclose(shares(temperature=0.5), squared, atol=0.04)


def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(byte_tokenizer):
    text = "a é 日本 🙂 e\u0301 end"
    pieces, out = TextPieces(byte_tokenizer), []
    for token in byte_tokenizer.encode(text):
        out.append(pieces.push(token))
    assert "".join(out) + pieces.finish() == text
    assert [piece for piece in out if piece] == list(text)


def test_bytes_that_never_make_a_character_come_out_at_the_end_or_with_the_next_character(byte_tokenizer):
    broken = byte_tokenizer.encode("日")[:2]
    pieces = TextPieces(byte_tokenizer)
    assert [pieces.push(token) for token in [*byte_tokenizer.encode("a"), *broken]] == ["a", "", ""]
    assert pieces.push(*byte_tokenizer.encode("b")) == "\ufffdb"
    assert [pieces.push(token) for token in broken] == ["", ""]
    assert pieces.finish() == "\ufffd"


def test_stream_gives_the_text_of_the_completion(byte_tokenizer):
    reader = language_model(tokenizer=byte_tokenizer)
    prefilled = reader.prefill(PROMPT, attention="dense")
    (answer,) = reader.complete(prefilled, max_new_tokens=40)
    assert "".join(reader.stream(prefilled, max_new_tokens=40)) == answer.text


def test_texts_are_encoded_and_chats_need_a_template(byte_tokenizer):
    reader = language_model(tokenizer=byte_tokenizer)
    assert byte_tokenizer.decode(reader.encode("hi")) == "hi"
    with pytest.raises(ValueError, match="no chat template"):
        reader.encode_chat("hi")
    byte_tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
    try:
        assert byte_tokenizer.decode(reader.encode_chat("hi")) == "[user]hi>"
    finally:
        byte_tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one token, got none"),
        ([[1], []], "prompt 1 must be a list of at least one token id"),
        ([0.5], "integer token ids, got float64"),
        ([61], "token ids from 61 to 61, they must lie from 0 to 60"),
        ([-1], "token ids from -1 to -1"),
        ([1] * 129, "the prompt has 129 tokens, the model can read 128"),
    ],
)
def test_impossible_prompts_are_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        model.prefill(prompts)


def test_texts_and_tokens_do_not_mix_and_empty_texts_are_named(model):
    with pytest.raises(ValueError, match="all texts or all token ids, got both"):
        model.generate(["hi", [1, 2]])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        model.generate("")


def test_stop_tokens_that_are_no_ids_are_refused(model):
    with pytest.raises(ValueError, match="stop_tokens must be token ids, got 'x'"):
        model.generate([1, 2], stop_tokens=["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number of at least 0"),
        ({"temperature": float("nan"), "key": 0}, "temperature=nan must be"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1 must be above 0"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect at temperature=0"),
        ({"temperature": 1.0}, r"give key=jax.random.key\(seed\)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be an integer"),
        ({"max_new_tokens": 105}, "24 tokens and max_new_tokens=105 need 129 positions, the model has 128"),
    ],
)
def test_impossible_options_are_refused_before_the_first_token(model, options, message, monkeypatch):
    prefilled = model.prefill(PROMPT, attention="dense")
    with pytest.raises(ValueError, match=message):
        model.decode(prefilled, **({"max_new_tokens": 4} | options))
    monkeypatch.setattr(LanguageModel, "prefill", None)  # and before a prompt is read
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "sparse"}, f"attention='sparse' must be one of {', '.join(ATTENTION_NAMES)}"),
        ({"attention": "dense", "pattern": Dense()}, "attention='dense' takes no pattern"),
        ({"attention": "a_shape"}, r"attention='a_shape' needs pattern=AShape\(...\) with its sizes, got None"),
        ({"attention": "a_shape", "pattern": UNIFORM["block_sparse"]}, r"needs pattern=AShape\(...\)"),
        ({"attention": "minference", "pattern": Dense()}, "takes ModelPatterns or None"),
        ({"attention": "minference", "pattern": uniform_patterns(2, 4)}, "do not fit a model of 3 layers of 4 heads"),
        ({"attention": "dense", "implementation": "abacus"}, "implementation='abacus' is not one of"),
    ],
)
def test_impossible_attention_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.prefill(PROMPT, **options)


def test_patterns_of_another_model_are_refused():
    with pytest.raises(ValueError, match="do not fit a model of 3 layers of 4 heads"):
        language_model(patterns=uniform_patterns(3, 5))


def test_text_needs_a_tokenizer(model):
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        model.generate("hello", max_new_tokens=1)
    prefilled = model.prefill(PROMPT, attention="dense")
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        model.stream(prefilled, max_new_tokens=1)


def test_committed_tokens_are_json():
    assert set(json.loads((tiny_models.FOLDER / "tiny_tokens.json").read_text())) == {
        *tiny_models.CASES,
        *families.CASES,
    }


def test_an_answer_that_grows_past_where_longrope_changes_is_refused_and_one_that_does_not_is_not():
    config = families.our_config("phi3_longrope_short")  # changes at 96 tokens
    model = LanguageModel(from_parameters(config, tiny_models.tiny_parameters(config)), stop_tokens=())
    prefilled = model.prefill([list(range(40)), list(range(30))], attention="dense")
    with pytest.raises(
        ValueError, match=r"prompt of 40 tokens and max_new_tokens=58 grow past 96 .* at most 57 tokens"
    ):
        model.decode(prefilled, max_new_tokens=58)
    assert len(model.complete(prefilled, max_new_tokens=57)[0].tokens) == 57
    long = model.prefill([1] * 97, attention="dense")
    assert len(model.complete(long, max_new_tokens=4)[0].tokens) == 4


def test_tokens_after_a_prefill_that_grow_past_where_longrope_changes_are_refused_to_the_last():
    config = families.our_config("phi3_longrope_short")  # changes at 96 tokens
    model = LanguageModel(from_parameters(config, tiny_models.tiny_parameters(config)))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, 98)
    first = model.prefill(tokens[:90], attention="dense")
    with pytest.raises(ValueError, match=r"^7 tokens after 90 grow past 96, where this model's longrope changes"):
        model.extend(first, tokens[90:97])
    whole = model.prefill(tokens[:96], attention="dense")
    np.testing.assert_allclose(model.extend(first, tokens[90:96]).logits, whole.logits, rtol=1e-4, atol=1e-4)
    long = model.extend(model.prefill(tokens[:97], attention="dense"), tokens[97:])
    whole = model.prefill(tokens, attention="dense")
    np.testing.assert_allclose(long.logits, whole.logits, rtol=1e-4, atol=1e-4)


def test_extended_prefill_is_that_of_the_whole_prompt(model):
    first = model.prefill(LONG_PROMPT[:90], attention="dense")
    once = model.extend(first, LONG_PROMPT[90:100])
    twice = model.extend(once, LONG_PROMPT[100:110])
    whole = model.prefill(LONG_PROMPT[:110], attention="dense")
    np.testing.assert_allclose(twice.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert model.complete(twice, max_new_tokens=8) == model.complete(whole, max_new_tokens=8)
    again = model.extend(first, LONG_PROMPT[90:100])  # what it went on from stays usable
    np.testing.assert_array_equal(again.logits, once.logits)


def test_rows_of_unequal_lengths_are_extended_together(model):
    prompts, more = [LONG_PROMPT[:50], LONG_PROMPT[:20]], [LONG_PROMPT[50:53], LONG_PROMPT[20:60]]
    together = model.extend(model.prefill(prompts, attention="dense"), more)
    for row, end in enumerate((53, 60)):
        alone = model.prefill(LONG_PROMPT[:end], attention="dense")
        np.testing.assert_allclose(together.logits[row], alone.logits[0], rtol=1e-4, atol=1e-4)
    sparse = model.prefill(LONG_PROMPT[:90], attention="a_shape", pattern=UNIFORM["a_shape"])
    np.testing.assert_array_equal(model.extend(sparse, LONG_PROMPT[90:]).density, sparse.density)


def test_prefill_is_extended_only_where_there_is_room(model):
    prefilled = model.prefill(PROMPT, attention="dense")
    with pytest.raises(ValueError, match="tokens of 2 rows do not go on from a prefill of 1"):
        model.extend(prefilled, [[1], [2]])
    with pytest.raises(ValueError, match="positions, the model has"):
        model.extend(prefilled, [1] * model.config.max_length)
    with pytest.raises(ValueError, match="the prompt has token ids"):
        model.extend(prefilled, [model.config.vocab_size])

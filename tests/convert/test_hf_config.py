"""What of a config.json is read, and what is refused by name."""

import json

import pytest
from goldens.families import CASES
from transformers import Glm4Config, GlmConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from minference_jax.convert.hf_config import read_config
from minference_jax.models.rope import RopeConfig

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.fixture
def llama(make):
    return dict(make.CONFIG)


@pytest.fixture
def mistral(llama):
    return llama | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


@pytest.fixture
def qwen2(llama):
    return llama | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }


def test_every_field_of_a_llama_is_read(llama):
    config = read_config(llama | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (48, 32, 64)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 8)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 128)
    assert config.rope == RopeConfig(rope_theta=10000.0)
    assert config.tie_embeddings
    assert config.qkv_bias
    assert config.o_bias
    assert config.mlp_bias


def test_absent_fields_have_the_defaults_of_transformers(llama):
    for name in ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings", "hidden_act"):
        del llama[name]
    config = read_config(llama)
    assert (config.num_kv_heads, config.head_dim, config.rope.rope_theta) == (4, 8, 10000.0)
    assert (config.tie_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias) == (False,) * 4


def test_qwen2_has_bias_on_q_k_and_v_only(qwen2):
    config = read_config(qwen2)
    assert config.qkv_bias
    assert not config.o_bias


def test_mistral_without_window_has_no_bias(mistral):
    assert not read_config(mistral).qkv_bias


@pytest.mark.parametrize(
    "kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Phi3Config, GlmConfig, Glm4Config]
)
def test_what_transformers_writes_is_read(kind):
    options = {"sliding_window": None} if kind is MistralConfig else {}
    theirs = kind(vocab_size=48, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **options)
    theirs.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    for content in (theirs.to_json_string(use_diff=False), theirs.to_json_string(use_diff=False).encode()):
        config = read_config(json.loads(content))
    assert (config.hidden_size, config.num_kv_heads, config.rope.rope_theta) == (32, 2, 10000.0)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4}, RopeConfig(rope_type="linear", factor=4)),
        ({"type": "dynamic", "factor": 2.0}, RopeConfig(rope_type="dynamic", factor=2.0)),
        ({"rope_type": "default"}, RopeConfig()),
        (LLAMA3_SCALING, RopeConfig(**LLAMA3_SCALING)),
        (
            {
                "rope_type": "yarn",
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": None,
            },
            RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        ),
    ],
)
def test_old_and_new_forms_of_rope_mean_the_same(llama, scaling, expected):
    old = read_config(llama | {"rope_scaling": scaling})
    theta = llama.pop("rope_theta")
    new = read_config(llama | {"rope_parameters": scaling | {"rope_theta": theta}})
    both = read_config(llama | {"rope_parameters": scaling | {"rope_theta": theta}, "rope_scaling": scaling})
    assert old.rope == new.rope == both.rope == expected


@pytest.mark.parametrize(
    "harmless",
    [
        {"torch_dtype": "bfloat16", "use_cache": False, "bos_token_id": 1, "initializer_range": 0.1},
        {"attention_dropout": 0.0, "transformers_version": "4.31.0", "_name_or_path": "x", "pretraining_tp": 1},
        {"transformers.js_config": {}, "is_llama_config": True, "rope_interleaved": False, "quantization_config": None},
        {"layer_types": ["full_attention"] * 3},
    ],
)
def test_fields_that_change_nothing_are_accepted(llama, harmless):
    assert read_config(llama | harmless) == read_config(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map="),
        ({"sliding_window": 100}, "sliding_window=100"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types="),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not a field this converter knows"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"hidden_size": "32"}, "hidden_size='32' must be an integer"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"attention_bias": "yes"}, "attention_bias='yes' must be true or false"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a number"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type='ntk' is not supported"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "rope_type='longrope' needs original_max_position_embeddings",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": "1"}}, "short_factor='1' must be an array of numbers"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported for model_type llama"),
        ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config={} is not a field"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings=64 is not a field"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "both rope_type='yarn' and type"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1}}, "alpha=1 is not a field"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "does not use beta_fast"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "contradicts"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": LLAMA3_SCALING, "rope_scaling": {"type": "linear", "factor": 8.0}}, "contradicts"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(llama, change, message):
    with pytest.raises(ValueError, match=r"config\.json") as error:
        read_config(llama | change)
    assert message in str(error.value)


def test_all_faults_are_named_at_once(llama):
    with pytest.raises(ValueError, match="hidden_act") as error:
        read_config(llama | {"hidden_act": "gelu", "pretraining_tp": 4, "soft": 1})
    assert all(name in str(error.value) for name in ("hidden_act", "pretraining_tp", "soft"))


def test_mistral_with_a_window_is_refused_also_where_it_is_implied(mistral):
    with pytest.raises(ValueError, match=r"sliding_window=127 .*prompts may have 128 tokens"):
        read_config(mistral | {"sliding_window": 127})
    del mistral["sliding_window"]
    with pytest.raises(ValueError, match="sliding_window is missing, which means 4096"):
        read_config(mistral)


def test_a_window_as_long_as_the_longest_prompt_cuts_nothing_and_is_accepted(mistral, qwen2):
    assert read_config(mistral | {"sliding_window": 128}) == read_config(mistral)
    wide = {"use_sliding_window": True, "sliding_window": 128, "layer_types": ["sliding_attention"] * 3}
    assert read_config(qwen2 | wide) == read_config(qwen2)
    stretched = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    with pytest.raises(ValueError, match=r"sliding_window=128 .*256 tokens"):
        read_config(mistral | {"sliding_window": 128} | stretched)


def test_mistral_and_qwen2_must_say_how_many_kv_heads(mistral, qwen2):
    for config in (mistral, qwen2):
        del config["num_key_value_heads"]
        with pytest.raises(ValueError, match="num_key_value_heads is missing"):
            read_config(config)


def test_qwen2_with_sliding_window_in_use_is_refused(qwen2):
    with pytest.raises(ValueError, match="sliding_window=64"):
        read_config(qwen2 | {"use_sliding_window": True, "sliding_window": 64})
    with pytest.raises(ValueError, match="needs sliding_window"):
        read_config(qwen2 | {"use_sliding_window": True, "sliding_window": None})


def test_bias_switches_are_refused_where_the_architecture_has_none(mistral, qwen2):
    for config in (mistral, qwen2):
        with pytest.raises(ValueError, match="attention_bias=true is not supported"):
            read_config(config | {"attention_bias": True})


def test_glm_turns_half_of_each_head_in_interleaved_pairs_unless_it_says_another_share():
    config = read_config(CASES["glm"])
    assert config.rope == RopeConfig(partial_rotary_factor=0.5, interleaved=True)
    assert config.qkv_bias
    assert not config.output_norms
    fields = {
        name: value for name, value in CASES["glm"].items() if name not in ("partial_rotary_factor", "attention_bias")
    }
    assert read_config(fields) == config
    newer = fields | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    assert read_config(newer).rope.partial_rotary_factor == 0.25
    assert read_config(CASES["glm4"]).output_norms


def test_families_with_a_shape_of_their_own_must_say_it():
    for name, missing in (("glm", "head_dim"), ("glm4", "num_key_value_heads"), ("qwen3", "head_dim")):
        fields = {field: value for field, value in CASES[name].items() if field != missing}
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            read_config(fields)


def test_phi3_finds_the_original_context_outside_and_inside_its_rope_and_under_its_old_name():
    case = CASES["phi3_longrope_long"]
    rope = read_config(case).rope
    assert (rope.rope_type, rope.given("original_max_position_embeddings")) == ("longrope", 16)
    assert len(rope.given("short_factor")) == 4
    for old in ("su", "yarn"):
        assert read_config(case | {"rope_scaling": case["rope_scaling"] | {"type": old}}).rope == rope
    inside = case["rope_scaling"] | {"original_max_position_embeddings": 16}
    fields = {field: value for field, value in case.items() if field != "original_max_position_embeddings"}
    assert read_config(fields | {"rope_scaling": inside}).rope == rope
    with pytest.raises(ValueError, match="contradicts"):
        read_config(case | {"rope_scaling": inside | {"original_max_position_embeddings": 32}})
    with pytest.raises(ValueError, match="needs original_max_position_embeddings"):
        read_config(fields)
    with pytest.raises(ValueError, match="short_factor has 3 numbers, 8 turned dimensions need 4"):
        read_config(case | {"rope_scaling": case["rope_scaling"] | {"short_factor": [1.0, 1.0, 1.0]}})
    with pytest.raises(ValueError, match="only 'longrope'"):
        read_config(case | {"rope_scaling": {"type": "linear", "factor": 2.0}})


def test_phi3_may_name_the_code_that_transformers_has_and_no_other():
    theirs = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert read_config(CASES["phi3"] | {"auto_map": theirs}) == read_config(CASES["phi3"])
    with pytest.raises(ValueError, match="auto_map="):
        read_config(CASES["phi3"] | {"auto_map": theirs | {"AutoModel": "surprise.Model"}})


def test_dual_chunk_attention_is_honoured_by_ending_where_it_begins(qwen2):
    chunks = {"chunk_size": 100, "local_size": 20, "original_max_position_embeddings": 90}
    assert read_config(qwen2 | {"dual_chunk_attention_config": chunks}).max_length == 80
    assert read_config(qwen2 | {"dual_chunk_attention_config": chunks | {"chunk_size": 400}}).max_length == 90
    for wrong in ({"chunk_size": 10}, {"chunk_size": 10, "local_size": 10}, chunks | {"more": 1}, 5):
        with pytest.raises(ValueError, match="dual_chunk_attention_config="):
            read_config(qwen2 | {"dual_chunk_attention_config": wrong})

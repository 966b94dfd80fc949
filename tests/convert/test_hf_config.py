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
        ({"sliding_window": 0}, "sliding_window=0 must be an integer of at least 1"),
        ({"layer_types": 5}, "layer_types=5 is not supported"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number"),
        ({"rope_theta": 10**400}, "must be a number"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type=['yarn'] must be a string"),
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


def test_prompts_are_as_long_as_the_window_at_most_also_where_that_is_implied(mistral, qwen2):
    assert read_config(mistral).max_length == 128
    assert read_config(mistral | {"sliding_window": 100}).max_length == 100
    assert read_config(mistral | {"sliding_window": 128}) == read_config(mistral)
    stretched = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert read_config(mistral | {"sliding_window": 128} | stretched).max_length == 128
    long = {name: value for name, value in mistral.items() if name != "sliding_window"} | {
        "max_position_embeddings": 9999
    }
    assert read_config(long).max_length == 4096
    assert (
        read_config(qwen2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}).max_length == 64
    )


def test_windows_that_no_layer_has_do_not_count(qwen2):
    slides = {"use_sliding_window": True, "sliding_window": 64}
    assert read_config(qwen2 | slides | {"max_window_layers": 3}) == read_config(qwen2)
    assert read_config(qwen2 | slides | {"layer_types": ["full_attention"] * 3}) == read_config(qwen2)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert read_config(qwen2 | slides | {"layer_types": kinds}).max_length == 64
    with pytest.raises(ValueError, match="needs sliding_window"):
        read_config(qwen2 | {"layer_types": kinds})


def test_mistral_and_qwen2_must_say_how_many_kv_heads(mistral, qwen2):
    for config in (mistral, qwen2):
        del config["num_key_value_heads"]
        with pytest.raises(ValueError, match="num_key_value_heads is missing"):
            read_config(config)


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


def test_dual_chunk_attention_is_honoured_by_ending_where_it_begins_and_leaves_rope_as_it_is(qwen2):
    chunks = {"chunk_size": 100, "local_size": 20, "original_max_position_embeddings": 90}
    config = read_config(qwen2 | {"dual_chunk_attention_config": chunks})
    assert (config.max_length, config.max_position_embeddings) == (80, 128)
    assert read_config(qwen2 | {"dual_chunk_attention_config": chunks | {"chunk_size": 400}}).max_length == 90
    stretched = {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    assert read_config(qwen2 | {"dual_chunk_attention_config": chunks} | stretched).max_length == 80
    for wrong in ({"chunk_size": 10}, {"chunk_size": 10, "local_size": 10}, chunks | {"more": 1}, 5):
        with pytest.raises(ValueError, match="dual_chunk_attention_config="):
            read_config(qwen2 | {"dual_chunk_attention_config": wrong})


def test_yarn_over_a_stated_context_reaches_factor_times_as_far(qwen2):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read_config(qwen2 | {"rope_scaling": yarn}).max_length == 512
    assert read_config(qwen2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}).max_length == 128


PUBLISHED = {
    "Phi-4-mini-instruct": (
        {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0}
        | {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoTokenizer": "Xenova/gpt-4o"}}
        | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "hidden_act": "silu"}
        | {"hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072, "num_hidden_layers": 32}
        | {"num_attention_heads": 24, "num_key_value_heads": 8, "original_max_position_embeddings": 4096}
        | {"partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}}
        | {"sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064, "eos_token_id": 199999},
        131072,
    ),
    "Qwen2.5-0.5B": (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896}
        | {"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "use_mrope": False}
        | {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06}
        | {"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 151936}
        | {"use_sliding_window": False, "attention_dropout": 0.0, "use_cache": True, "bos_token_id": 151643},
        32768,
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096}
        | {"intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "vocab_size": 32000}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
        | {"sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
        4096,
    ),
    "GLM-4-9B-0414": (
        {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": True, "head_dim": 128}
        | {"attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338, 151349], "hidden_act": "silu"}
        | {"hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768, "rope_theta": 10000.0}
        | {"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329}
        | {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 151552},
        32768,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_configs_are_read(name):
    fields, length = PUBLISHED[name]
    config = read_config(fields)
    assert (config.max_length, config.num_layers) == (length, fields["num_hidden_layers"])
    if "auto_map" in fields:
        prefixed = {key: f"organisation/model--{value}" for key, value in fields["auto_map"].items()}
        assert read_config(fields | {"auto_map": prefixed}) == config

"""Flax NNX models. A model is told how to attend and knows nothing of sparsity, checkpoints or prompts."""

from minference_jax.models.config import DecoderConfig
from minference_jax.models.decoder import Decoder
from minference_jax.models.fp8 import linear_of, quantize_parameters
from minference_jax.models.glm import Glm, GlmConfig
from minference_jax.models.layers import Attend, dense_attend
from minference_jax.models.llama import Llama, LlamaConfig
from minference_jax.models.parameters import (
    abstract_model,
    from_parameters,
    parameter_shapes,
    parameters_of,
    quantize_linear,
)
from minference_jax.models.partition import parameter_shardings
from minference_jax.models.phi3 import Phi3, Phi3Config
from minference_jax.models.qwen3 import Qwen3, Qwen3Config
from minference_jax.models.rope import RopeConfig

__all__ = [
    "Attend",
    "Decoder",
    "DecoderConfig",
    "Glm",
    "GlmConfig",
    "Llama",
    "LlamaConfig",
    "Phi3",
    "Phi3Config",
    "Qwen3",
    "Qwen3Config",
    "RopeConfig",
    "abstract_model",
    "dense_attend",
    "from_parameters",
    "linear_of",
    "parameter_shapes",
    "parameter_shardings",
    "parameters_of",
    "quantize_linear",
    "quantize_parameters",
]

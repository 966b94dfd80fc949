"""Flax NNX models. A model is told how to attend and knows nothing of sparsity, checkpoints or prompts."""

from minference_jax.models.layers import Attend, dense_attend
from minference_jax.models.llama import Llama, LlamaConfig
from minference_jax.models.parameters import from_parameters, parameter_shapes, parameters_of
from minference_jax.models.rope import RopeConfig

__all__ = [
    "Attend",
    "Llama",
    "LlamaConfig",
    "RopeConfig",
    "dense_attend",
    "from_parameters",
    "parameter_shapes",
    "parameters_of",
]

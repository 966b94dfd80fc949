"""LLaMA and the models that share its architecture: SmolLM2, Yi, Mistral and, with qkv_bias, Qwen2 and Qwen2.5.

Source: LLaMA (arXiv 2302.13971), Llama 2 and 3; weights and numbers agree with transformers' PyTorch models.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from minference_jax.models.config import DecoderConfig
from minference_jax.models.decoder import Decoder
from minference_jax.models.layers import PreNormLayer


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Shape and switches of a LLaMA.

    Attributes:
        qkv_bias, o_bias, mlp_bias: which projections have a bias.

    Raises:
        ValueError: as `DecoderConfig`.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False


class LlamaLayer(PreNormLayer):
    """One layer of a LLaMA."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        biases = {"qkv_bias": config.qkv_bias, "o_bias": config.o_bias, "mlp_bias": config.mlp_bias}
        super().__init__(config, **biases, rngs=rngs, param_dtype=param_dtype)


class Llama(Decoder):
    """A LLaMA with random parameters; arguments and call as in `Decoder`."""

    layer_type = LlamaLayer

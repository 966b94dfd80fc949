"""Qwen3: a LLaMA with a norm over each head's queries and keys, and no bias unless attention_bias.

Source: the Qwen3 technical report (arXiv 2505.09388); numbers agree with transformers' PyTorch Qwen3.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from minference_jax.models.config import DecoderConfig
from minference_jax.models.decoder import Decoder
from minference_jax.models.layers import PreNormLayer


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """Shape and switches of a dense Qwen3.

    Attributes:
        attention_bias: whether the four projections of attention have a bias.

    Raises:
        ValueError: as `DecoderConfig`.
    """

    attention_bias: bool = False


class Qwen3Layer(PreNormLayer):
    """One layer of a Qwen3."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        bias = config.attention_bias
        super().__init__(config, qkv_bias=bias, o_bias=bias, qk_norm=True, rngs=rngs, param_dtype=param_dtype)


class Qwen3(Decoder):
    """A Qwen3 with random parameters; arguments and call as in `Decoder`."""

    layer_type = Qwen3Layer

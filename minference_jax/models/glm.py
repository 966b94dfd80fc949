"""GLM-4: a LLaMA whose heads turn in their first half only, in interleaved pairs, with a bias on q, k and v.

`output_norms` makes it the later GLM-4-0414 (`glm4` in transformers), which also norms what attention and MLP give.
Checkpoints fuse gate and up in one matrix; here they are apart, as in all our models.
Source: ChatGLM (arXiv 2406.12793); numbers agree with transformers' PyTorch Glm and Glm4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx

from minference_jax.models.config import DecoderConfig
from minference_jax.models.decoder import Decoder
from minference_jax.models.layers import PreNormLayer, RMSNorm


@dataclass(frozen=True, kw_only=True)
class GlmConfig(DecoderConfig):
    """Shape and switches of a GLM-4. Its `rope` is interleaved, over half of each head where a checkpoint says no more.

    Attributes:
        qkv_bias: whether q, k and v have a bias.
        output_norms: whether the outputs of attention and MLP are normed before they join the residual stream.

    Raises:
        ValueError: as `DecoderConfig`.
    """

    qkv_bias: bool = True
    output_norms: bool = False


class GlmLayer(PreNormLayer):
    """One layer of a GLM-4; with `output_norms` attention and MLP each stand between two norms."""

    def __init__(self, config: GlmConfig, *, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        super().__init__(config, qkv_bias=config.qkv_bias, rngs=rngs, param_dtype=param_dtype)
        norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.attention_output_norm = norm() if config.output_norms else None
        self.mlp_output_norm = norm() if config.output_norms else None

    def add_outputs(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        """As `PreNormLayer`."""
        if self.attention_output_norm is None or self.mlp_output_norm is None:
            return super().add_outputs(x, heads)
        x = x + self.attention_output_norm(self.attention.output(heads))
        return x + self.mlp_output_norm(self.mlp(self.post_attention_norm(x)))


class Glm(Decoder):
    """A GLM-4 with random parameters; arguments and call as in `Decoder`."""

    layer_type = GlmLayer

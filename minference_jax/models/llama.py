"""LLaMA and the models that share its architecture (SmolLM2, Yi, Mistral without window, Qwen2 with qkv_bias).

Source: LLaMA (arXiv 2302.13971), Llama 2 and 3; weights and numbers agree with transformers' PyTorch LLaMA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minference_jax.cache import KVCache
from minference_jax.models.decoder import check_call, run_layers, select_rows, stack_layers
from minference_jax.models.layers import MLP, Attend, Attention, Embedding, Linear, RMSNorm, dense_attend
from minference_jax.models.rope import RopeConfig, rotate, rotation_angles


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape and switches of a LLaMA.

    Attributes:
        vocab_size, hidden_size, intermediate_size: V, D and the MLP's inner features.
        num_layers, num_heads, num_kv_heads, head_dim: L, N, K, H; N is a multiple of K, H is even.
        rms_norm_eps: added to the mean square in the norms.
        max_position_embeddings: tokens the model was made for (before scaling where rope is dynamic).
        rope: position embedding.
        tie_embeddings: whether the logits use the embedding table instead of a matrix of their own.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.

    Raises:
        ValueError: a size that is not positive or sizes that do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs of dimensions")
        if self.rms_norm_eps < 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must not be negative")

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together: max_position_embeddings, stretched where rope is dynamic."""
        if self.rope.rope_type == "dynamic":
            return int(self.max_position_embeddings * self.rope.given("factor"))
        return self.max_position_embeddings


class LlamaLayer(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream.

    Args:
        config: of the model.
        rngs, param_dtype: of the parameters.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.attention = Attention(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(
            config.hidden_size, config.intermediate_size, use_bias=config.mlp_bias, rngs=rngs, param_dtype=param_dtype
        )

    def __call__(self, x, rotate, attend):
        out, extras = self.attention(self.input_norm(x), rotate, attend)
        x = x + out
        return x + self.mlp(self.post_attention_norm(x)), extras


class Llama(nnx.Module):
    """A LLaMA with random parameters; `from_parameters` builds one around given arrays.

    Args:
        config: shape and switches.
        rngs: keys of the random parameters.
        param_dtype: dtype of parameters, activations and cache; norms, rotation, softmax and logits are float32.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike = jnp.float32):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.layers = stack_layers(
            config.num_layers, lambda layer_rngs: LlamaLayer(config, rngs=layer_rngs, param_dtype=param_dtype), rngs
        )
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs, param_dtype=param_dtype)
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the parameters, and so of activations and cache."""
        return self.embed.embedding[...].dtype

    def __call__(
        self,
        tokens: jax.Array,
        cache: KVCache,
        *,
        lengths: jax.Array | None = None,
        attend: Attend = dense_attend,
        layer_inputs: Any = None,
        logits: str = "last",
    ) -> tuple[jax.Array, KVCache, Any]:
        """Reads new tokens after those in the cache. A step of decoding is the same call with T = 1.

        Args:
            tokens: int32 [B, T]; ids must lie in [0, vocab_size).
            cache: of this model's shape and dtype; row b holds `cache.length[b]` tokens and must have room for T more.
            lengths: int32 [B], true number of new tokens in each row, from 1 to T; None = T. Rows beyond are padding:
                they are written beyond the new length, where the next call overwrites them.
            attend: how to attend.
            layer_inputs: pytree of arrays with leading axis L, sliced for each layer's `attend`; None = nothing.
            logits: "last" for those after each row's last true token, "all" for every token.

        Returns:
            logits float32 [B, V] or [B, T, V]; the cache with the new tokens; what `attend` returned beside its
            output, stacked over the layers [L, ...].

        Raises:
            ValueError: shapes or dtypes that do not fit the model, a cache smaller than T, an unknown `logits`.
        """
        check_call(self.config, tokens, cache, lengths, logits, self.dtype)
        config, (batch, count) = self.config, tokens.shape
        if lengths is None:
            lengths = jnp.full((batch,), count, jnp.int32)
        positions = cache.length[:, None] + jnp.arange(count, dtype=jnp.int32)
        cos, sin = rotation_angles(
            config.rope, config.head_dim, config.max_position_embeddings, positions, cache.length + lengths
        )
        x, cache, aux = run_layers(
            self.layers,
            self.embed(tokens),
            cache,
            rotate=lambda heads: rotate(heads, cos, sin),
            attend=attend,
            layer_inputs=layer_inputs,
            lengths=lengths,
            scale=config.head_dim**-0.5,
        )
        x = self.final_norm(select_rows(x, lengths, logits))
        if self.lm_head is None:
            return self.embed.logits(x), cache, aux
        out = jnp.matmul(x, self.lm_head.kernel[...], preferred_element_type=jnp.float32)
        return out, cache, aux

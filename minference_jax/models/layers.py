"""Layers that the models share. Parameters keep the dtype they are given; norms are computed in float32.

`Attend` is the seam between models and attention: a model says what to attend with, never how.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from minference_jax.attention import dense_attention
from minference_jax.models.config import DecoderConfig
from minference_jax.models.rope import Rotation, rotate

INIT_SCALE = 0.02  # standard deviation of random kernels and embeddings
TOKENS_AT_ONCE = 16384
"""Tokens, of all rows together, for which the wide activations of a layer exist at a time."""


def per_token(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """A function of single tokens over all tokens of a batch, TOKENS_AT_ONCE at a time.

    What it needs meanwhile, such as the MLP's activations, then takes the memory of so many tokens, however long the
    prompt.

    Args:
        function: arrays [..., features] -> pytree of arrays [..., features]; each token's result is its own.
        arrays: [B, T, ...].

    Returns:
        What `function` gives, [B, T, ...].
    """
    batch, count = arrays[0].shape[:2]
    if batch * count <= TOKENS_AT_ONCE:
        return function(*arrays)
    rows = [array.reshape(batch * count, *array.shape[2:]) for array in arrays]
    whole = batch * count // TOKENS_AT_ONCE * TOKENS_AT_ONCE
    parts = tuple(array[:whole].reshape(-1, TOKENS_AT_ONCE, *array.shape[1:]) for array in rows)
    out = jax.lax.map(lambda part: function(*part), parts)
    out = jax.tree.map(lambda array: array.reshape(whole, *array.shape[2:]), out)
    if whole < batch * count:
        rest = function(*(array[whole:] for array in rows))
        out = jax.tree.map(lambda first, last: jnp.concatenate([first, last]), out, rest)
    return jax.tree.map(lambda array: array.reshape(batch, count, *array.shape[1:]), out)


class Attend(Protocol):
    """How a model attends: over the whole cache of one layer, for all heads at once."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer_input: Any,
        *,
        scale: float,
        q_offset: jax.Array,
        kv_len: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """The attention output and whatever else the caller wants to see of it.

        Args:
            q: queries [B, T, N, H] of the new tokens.
            k, v: keys and values [B, S, K, H] of the layer, the new ones among them.
            layer_input: this layer's slice of the model call's `layer_inputs`.
            scale: what q·k is multiplied with.
            q_offset: int32 [B], position of the first query.
            kv_len: int32 [B], tokens present.

        Returns:
            out [B, T, N, H], and a pytree of arrays that the model call stacks over the layers.
        """


def dense_attend(q, k, v, layer_input, *, scale, q_offset, kv_len):
    """Exact causal attention (an `Attend`); looks at no layer input and returns None beside the output."""
    return dense_attention(q, k, v, scale=scale, q_offset=q_offset, kv_len=kv_len), None


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, statistics in float32.

    Args:
        size: length of the last axis.
        eps: added to the mean square.
        param_dtype: of the scale.
    """

    def __init__(self, size: int, *, eps: float, param_dtype: jax.typing.DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.float32)
        exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + self.eps)
        return (exact * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel [in, out], plus a bias [out] where the model has one.

    Args:
        in_size, out_size: features.
        use_bias: whether there is a bias.
        rngs: key of the random kernel.
        param_dtype: of kernel and bias.
    """

    def __init__(
        self, in_size: int, out_size: int, *, use_bias: bool, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike
    ):
        self.kernel = nnx.Param(nnx.initializers.normal(INIT_SCALE)(rngs.params(), (in_size, out_size), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_size,), param_dtype)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        out = x @ self.kernel[...]
        return out if self.bias is None else out + self.bias[...]


class Embedding(nnx.Module):
    """A table of one vector per token [V, D].

    Args:
        vocab_size, size: V and D.
        rngs: key of the random table.
        param_dtype: of the table.
    """

    def __init__(self, vocab_size: int, size: int, *, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        table = nnx.initializers.normal(INIT_SCALE)(rngs.params(), (vocab_size, size), param_dtype)
        self.embedding = nnx.Param(table)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...][tokens]

    def logits(self, x: jax.Array) -> jax.Array:
        """x [..., D] against every token's vector, accumulated in float32: [..., V]."""
        return jnp.einsum("...d,vd->...v", x, self.embedding[...], preferred_element_type=jnp.float32)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Args:
        size, intermediate_size: features outside and inside.
        use_bias: whether the three projections have a bias.
        rngs, param_dtype: as in `Linear`.
    """

    def __init__(
        self, size: int, intermediate_size: int, *, use_bias: bool, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike
    ):
        linear = partial(Linear, use_bias=use_bias, rngs=rngs, param_dtype=param_dtype)
        self.gate_proj = linear(size, intermediate_size)
        self.up_proj = linear(size, intermediate_size)
        self.down_proj = linear(intermediate_size, size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nnx.Module):
    """Projections around grouped-query attention, each of single tokens; the attention itself comes between them.

    Args:
        hidden_size: D.
        num_heads, num_kv_heads, head_dim: N, K, H.
        qkv_bias, o_bias: which projections have a bias.
        qk_norm_eps: of a norm over each head's dimensions of q and k, before they turn; None = there is none.
        rngs, param_dtype: as in `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm_eps: float | None = None,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike,
    ):
        self.head_dim = head_dim
        linear = partial(Linear, rngs=rngs, param_dtype=param_dtype)
        self.q_proj = linear(hidden_size, num_heads * head_dim, use_bias=qkv_bias)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim, use_bias=qkv_bias)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim, use_bias=qkv_bias)
        self.o_proj = linear(num_heads * head_dim, hidden_size, use_bias=o_bias)
        norm = partial(RMSNorm, head_dim, param_dtype=param_dtype)
        self.q_norm = None if qk_norm_eps is None else norm(eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else norm(eps=qk_norm_eps)

    def project(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalised hidden states [..., D] -> queries [..., N, H], keys and values [..., K, H]; see `rotate`."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (project(x).reshape(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(heads, cos, sin, interleaved=interleaved) for heads in (q, k))
        return q, k, v

    def output(self, heads: jax.Array) -> jax.Array:
        """What attention gives [..., N, H] -> [..., D]."""
        return self.o_proj(heads.reshape(*heads.shape[:-2], -1))


class PreNormLayer(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream.

    Args:
        config: of the model.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: whether each head's q and k are normed before they turn.
        rngs, param_dtype: as in `Linear`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike,
    ):
        size = config.hidden_size
        self.input_norm = RMSNorm(size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.attention = Attention(
            size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            qk_norm_eps=config.rms_norm_eps if qk_norm else None,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.post_attention_norm = RMSNorm(size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(size, config.intermediate_size, use_bias=mlp_bias, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation,
        attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> (x [B, T, D], what `attend` returned beside its output).

        Args:
            x: hidden states.
            rotation: of the tokens' queries and keys.
            attend: (q, k, v) of the new tokens -> (out [B, T, N, H], anything).
        """

        def project(x, cos, sin):
            return self.attention.project(self.input_norm(x), cos, sin, interleaved=rotation.interleaved)

        heads, extras = attend(*per_token(project, x, rotation.cos, rotation.sin))
        return per_token(self.add_outputs, x, heads), extras

    def add_outputs(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        """The residual stream [..., D] with what attention gave, [..., N, H], and what the MLP makes of it."""
        x = x + self.attention.output(heads)
        return x + self.mlp(self.post_attention_norm(x))

"""What all decoders share: one compiled layer under a scan, the cache, the logits asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from minference_jax.cache import AnyPolicy, KVCache, QuantisedKV, SplitCache
from minference_jax.models.caching import cache_access
from minference_jax.models.config import DecoderConfig
from minference_jax.models.layers import Attend, Embedding, Linear, RMSNorm, dense_attend
from minference_jax.models.rope import Rotation, rotation_angles


class Decoder(nnx.Module):
    """A decoder with random parameters; `from_parameters` builds one around given arrays. A family sets `layer_type`.

    Args:
        config: shape and switches of the family.
        rngs: keys of the random parameters.
        param_dtype: dtype of parameters, activations and cache; norms, rotation, softmax and logits are float32.
    """

    layer_type: ClassVar[Callable[..., nnx.Module]]

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike = jnp.float32):
        def make_layer(layer_rngs: nnx.Rngs) -> nnx.Module:
            return type(self).layer_type(config, rngs=layer_rngs, param_dtype=param_dtype)

        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.layers = stack_layers(config.num_layers, make_layer, rngs)
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, param_dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs, param_dtype=param_dtype)
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the parameters, and so of activations and cache."""
        return self.embed.embedding.get_value().dtype

    def __call__(
        self,
        tokens: jax.Array,
        cache: KVCache | QuantisedKV | SplitCache | AnyPolicy,
        *,
        lengths: jax.Array | None = None,
        attend: Attend = dense_attend,
        layer_inputs: Any = None,
        logits: str = "last",
        rope_lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """Reads new tokens after those in the cache. A step of decoding is the same call with T = 1.

        Args:
            tokens: int32 [B, T]; ids must lie in [0, vocab_size).
            cache: of this model's shape and dtype; row b holds `cache.length[b]` tokens and must have room for T more.
                Or a cache policy: the tokens are whole prompts, each layer attends over its own keys and values, and
                what the policy keeps of them is stored. Or a `SplitCache`: `dense_attend` reads it where it lies, for
                another `attend` each layer of it is written out.
            lengths: int32 [B], true number of new tokens in each row, from 0 to T; None = T. Rows beyond are padding:
                they are written beyond the new length, where the next call overwrites them. A row of 0 keeps its
                tokens, and its last logits mean nothing.
            attend: how to attend.
            layer_inputs: pytree of arrays with leading axis L, sliced for each layer's `attend`; None = nothing.
            logits: "last" for those after each row's last true token, "all" for every token, "hidden" for none: the
                hidden states that `head` makes them of, since all logits of a long prompt take more memory than it.
            rope_lengths: int32 [B], tokens of each row that `dynamic` and `longrope` turn for: of the whole prompt,
                where this call reads a part of it; None = those that the row holds after this call.

        Returns:
            logits float32 [B, V] or [B, T, V], or hidden states [B, T, D] in the model's dtype; the cache with the new
            tokens, for a policy what it stored; what `attend` returned beside its output, stacked over the layers
            [L, ...].

        Raises:
            ValueError: shapes or dtypes that do not fit the model, a cache smaller than T, an unknown `logits`.
        """
        check_call(self.config, tokens, cache, lengths, logits, self.dtype)
        config, (batch, count) = self.config, tokens.shape
        if lengths is None:
            lengths = jnp.full((batch,), count, jnp.int32)
        start = cache.length if isinstance(cache, KVCache | QuantisedKV | SplitCache) else jnp.zeros_like(lengths)
        if rope_lengths is None:
            rope_lengths = start + lengths
        x, cache, aux = run_layers(
            self.layers,
            self.embed(tokens),
            cache,
            rotation=self._rotation(count, start, rope_lengths),
            attend=attend,
            layer_inputs=layer_inputs,
            lengths=lengths,
            scale=config.head_dim**-0.5,
        )
        x = self.final_norm(select_rows(x, lengths, logits))
        return (x if logits == "hidden" else self.head(x)), cache, aux

    def head(self, x: jax.Array) -> jax.Array:
        """Logits float32 [..., V] of hidden states [..., D] as a call with logits="hidden" gives them."""
        if self.lm_head is None:
            return self.embed.logits(x)
        return jnp.matmul(x, self.lm_head.kernel[...], preferred_element_type=jnp.float32)

    def run_layer(
        self,
        index: int | jax.Array,
        x: jax.Array,
        lengths: jax.Array,
        attend: Attend,
        layer_input: Any = None,
        *,
        start: jax.Array | None = None,
        rope_lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs one layer over prompts, or a part of each, without a cache: to look at layers one at a time.

        Args:
            index: which layer, from 0; an int32 [] may be traced.
            x: hidden states [B, T, D] before it; `embed(tokens)` before the first.
            lengths: int32 [B], true number of tokens in each row; rows beyond are padding.
            attend: how to attend.
            layer_input: what it is given; None = nothing.
            start: int32 [B], tokens of each row before these, of which `attend` is told; None = 0.
            rope_lengths: as in a call of the model; None = the tokens up to the last of these.

        Returns:
            hidden states [B, T, D] behind it, and what `attend` returned beside its output.

        Raises:
            ValueError: there is no such layer.
        """
        if isinstance(index, int) and not 0 <= index < self.config.num_layers:
            raise ValueError(f"layer {index} is not one of 0 to {self.config.num_layers - 1}")
        graph, parameters = nnx.split(self.layers)
        layer = nnx.merge(graph, jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), parameters))
        start = jnp.zeros_like(lengths) if start is None else start
        kv_len = start + lengths

        def attend_prompt(q, k, v):
            scale = self.config.head_dim**-0.5
            return attend(q, k, v, layer_input, scale=scale, q_offset=start, kv_len=kv_len)

        rope_lengths = kv_len if rope_lengths is None else rope_lengths
        return layer(x, self._rotation(x.shape[1], start, rope_lengths), attend_prompt)

    def _rotation(self, count: int, start: jax.Array, lengths: jax.Array) -> Rotation:
        """What turns queries and keys of `count` tokens from position `start` [B] on, `lengths` [B] tokens in all."""
        config, rope = self.config, self.config.rope
        positions = start[:, None] + jnp.arange(count, dtype=jnp.int32)
        size = rope.rotary_dim(config.head_dim)
        cos, sin = rotation_angles(rope, size, config.max_position_embeddings, positions, lengths)
        return Rotation(cos, sin, rope.interleaved)


def stack_layers(num_layers: int, make_layer: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters are those of `num_layers` layers, stacked on a leading axis.

    Args:
        num_layers: L.
        make_layer: builds one layer from its own random keys.
        rngs: split into one key per layer.
    """

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(layer_rngs):
        return make_layer(layer_rngs)

    return make(rngs)


def run_layers(
    layers: nnx.Module,
    x: jax.Array,
    cache: KVCache | QuantisedKV | SplitCache | AnyPolicy,
    *,
    rotation: Rotation,
    attend: Attend,
    layer_inputs: Any,
    lengths: jax.Array,
    scale: float,
) -> tuple[jax.Array, Any, Any]:
    """Runs x through all layers, which read and write the cache as `models.caching` tells for its kind.

    A cache that is written is carried through the scan, not stacked by it, so that a step writes its own tokens and
    copies nothing; what is stored of whole prompts is stacked.

    Args:
        layers: from `stack_layers`; called as layer(x, rotation, attend).
        x: embedded tokens [B, T, D].
        cache: tokens read so far, the new ones start at `cache.length`; or the policy of a cache to be made.
        rotation: of queries and keys, for their positions.
        attend: how to attend.
        layer_inputs: pytree with leading axis L, one slice for each layer's `attend`; None = nothing.
        lengths: int32 [B], true number of new tokens.
        scale: what q·k is multiplied with.

    Returns:
        x [B, T, D]; the cache with the new tokens; what `attend` returned beside its output, stacked [L, ...].
    """
    graph, parameters = nnx.split(layers)
    num_layers = jax.tree.leaves(parameters)[0].shape[0]
    access = cache_access(cache, lengths, num_layers, in_place=attend is dense_attend)

    def call(layer_input, q, k, v, **where):
        return attend(q, k, v, layer_input, scale=scale, **where)

    def run_one(carry, per_layer):
        x, written = carry
        index, layer_parameters, layer_input = per_layer

        def attend_and_keep(q, k, v):
            out, *rest = access.attend(partial(call, layer_input), q, k, v, written, index, scale)
            return out, rest

        x, (aux, written, kept) = nnx.merge(graph, layer_parameters)(x, rotation, attend_and_keep)
        return (x, written), (aux, kept)

    indices = jnp.arange(num_layers, dtype=jnp.int32)
    (x, written), (aux, kept) = lax.scan(run_one, (x, access.written), (indices, parameters, layer_inputs))
    return x, access.close(written, kept), aux


def select_rows(x: jax.Array, lengths: jax.Array, logits: str) -> jax.Array:
    """The hidden states whose logits are asked for: [B, D] of each row's last true token, or all [B, T, D].

    Args:
        x: hidden states [B, T, D].
        lengths: int32 [B], true number of tokens, at least 1.
        logits: "last", "all" or "hidden".
    """
    if logits != "last":
        return x
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def check_call(
    config: Any,
    tokens: jax.Array,
    cache: KVCache | QuantisedKV | SplitCache | AnyPolicy,
    lengths: jax.Array | None,
    logits: str,
    dtype: jnp.dtype,
) -> None:
    """Refuses what a decoder's call can know to be wrong without running it.

    Args:
        config: with num_layers, num_kv_heads and head_dim.
        tokens, cache, lengths, logits: the arguments of the call.
        dtype: of the model's parameters, and so of its cache.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an unknown `logits`.
    """
    if logits not in ("last", "all", "hidden"):
        raise ValueError(f'{logits=} must be "last", "all" or "hidden"')
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or 0 in tokens.shape:
        raise ValueError(f"tokens must be integers [B, T] with B, T >= 1, got {tokens.dtype}{list(tokens.shape)}")
    batch, count = tokens.shape
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths must be [{batch}], one for each row of tokens, got {list(lengths.shape)}")
    if isinstance(cache, SplitCache):
        cache = cache.tail
    if not isinstance(cache, KVCache | QuantisedKV):
        return
    expected = (config.num_layers, batch, cache.capacity, config.num_kv_heads, config.head_dim)
    for name, array in (("k", cache.k), ("v", cache.v)):
        if array.shape != expected:
            raise ValueError(f"cache.{name} is {list(array.shape)}, this model and batch need {list(expected)}")
        if isinstance(cache, KVCache) and array.dtype != dtype:
            raise ValueError(f"cache.{name} is {array.dtype}, the model's parameters are {dtype}")
    if isinstance(cache, QuantisedKV):
        cache.check()
    if not isinstance(cache.length, jax.core.Tracer) and np.asarray(cache.length).max() + count > cache.capacity:
        held = np.asarray(cache.length).max()
        raise ValueError(f"{count} new tokens do not fit a cache of {cache.capacity} that holds {held} already")
    if count > cache.capacity:
        raise ValueError(f"{count} new tokens do not fit a cache of {cache.capacity}")

"""The oracle: attention written plainly, with the whole score matrix in memory."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def attention(q: Array, k: Array, v: Array, mask: Array, *, scale: float) -> tuple[Array, Array]:
    """Masked attention in the inputs' dtype, softmax in float32.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], N a multiple of K. Any one float dtype.
      mask: bool [B, N, T, S], True = attend.
      scale: multiplies the scores.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, T, N], natural log; rows with no key give zeros and -inf.
    """
    group_size = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group_size, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32, precision="highest") * scale
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total != 0, total, 1.0)
    out = jnp.einsum("bnts,bsnh->btnh", weights.astype(q.dtype), v, precision="highest")
    lse = jnp.where(total != 0, jnp.log(total) + top, -jnp.inf)[..., 0]
    return out.astype(q.dtype), lse.swapaxes(1, 2)

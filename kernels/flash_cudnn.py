"""Dense causal attention by cuDNN, through JAX: NVIDIA GPUs, half precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from minference_jax.kernels.softmax import valid_rows
from minference_jax.kernels.tiles import Device, TileConfig, compute_capability


def check_device(device: Device, head_dim: int, itemsize: int) -> TileConfig:
    """Tiles that nothing reads, where cuDNN can do the call.

    Raises:
      NotImplementedError: it can't.
    """
    widest = 256 if compute_capability(device) >= (9, 0) else 128
    if itemsize != 2 or head_dim % 8 or head_dim > widest:
        raise NotImplementedError(
            f"it needs bfloat16 or float16 and a head_dim that is a multiple of 8 up to {widest}, not {head_dim}"
        )
    return TileConfig()


def attention(q: Array, k: Array, v: Array, *, scale: float, kv_len: Array | None) -> Array:
    """Causal attention of queries that start at position 0.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], N a multiple of K; bfloat16 or float16.
      scale: multiplies the scores.
      kv_len: int32 [B], valid keys, rows from there on are padding; None = S.

    Returns:
      out [B, T, N, H] in q's dtype; padding gives zeros.

    Raises:
      NotImplementedError: the scale is not positive, or there is no cuDNN.
    """
    if scale <= 0:
        raise NotImplementedError(f"it needs a positive scale, not {scale}")
    lengths: dict[str, Any] = {}
    if kv_len is not None:
        v = jax.vmap(valid_rows)(v, kv_len)
        lengths = {"query_seq_lengths": jnp.minimum(kv_len, q.shape[1]), "key_value_seq_lengths": kv_len}
    try:
        out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn", **lengths)
    except RuntimeError as error:  # jax found no cuDNN, or too old a one
        raise NotImplementedError(f"cuDNN: {error}") from error
    if kv_len is None:
        return out
    return jnp.where((jnp.arange(q.shape[1]) < kv_len[:, None])[:, :, None, None], out, 0)

"""sparse_attention inside an attention layer of your own: plain JAX, your weights, a pattern for every head.

The patterns are an argument of the jitted function, so other patterns run the same compiled program.
Run it: python examples/custom_attention.py
"""

import jax
import jax.numpy as jnp

from minference_jax import AShape, BlockSparse, Dense, ModelPatterns, PatternArrays, VerticalSlash, sparse_attention

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 256, 4, 2, 64


def init_weights(key):
    """The projections of one layer, as your model may keep them."""
    shapes = {
        "q": (HIDDEN, NUM_HEADS, HEAD_DIM),
        "k": (HIDDEN, NUM_KV_HEADS, HEAD_DIM),
        "v": (HIDDEN, NUM_KV_HEADS, HEAD_DIM),
        "o": (NUM_HEADS, HEAD_DIM, HIDDEN),
    }
    keys = jax.random.split(key, len(shapes))
    return {name: 0.05 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


@jax.jit
def attention_layer(weights, x, lengths, pattern):
    """Attends within x [B, T, HIDDEN], of which the first lengths [B] tokens of each row are no padding."""
    q = jnp.einsum("btd,dnh->btnh", x, weights["q"])
    k = jnp.einsum("btd,dkh->btkh", x, weights["k"])
    v = jnp.einsum("btd,dkh->btkh", x, weights["v"])
    out, density = sparse_attention(q, k, v, pattern, kv_len=lengths, return_density=True)
    return jnp.einsum("btnh,nhd->btd", out, weights["o"]), density


def patterns_of_layer(*heads):
    """The arrays of one layer's heads, as attention_layer takes them."""
    patterns = ModelPatterns(layers=(heads,), source="this example")
    return PatternArrays(*(sizes[0] for sizes in patterns.arrays()))


def main():
    """Runs the layer with two sets of patterns and prints what each head computed."""
    weights_key, x_key = jax.random.split(jax.random.key(0))
    weights = init_weights(weights_key)
    x = jax.random.normal(x_key, (2, 2048, HIDDEN))
    lengths = jnp.array([2048, 1500], jnp.int32)
    mixed = patterns_of_layer(
        VerticalSlash(vertical_size=64, slash_size=128),
        AShape(sink_size=64, window_size=256),
        BlockSparse(num_blocks=4),
        Dense(),
    )
    dense = patterns_of_layer(*[Dense()] * NUM_HEADS)
    for name, pattern in (("mixed", mixed), ("dense", dense)):
        out, density = attention_layer(weights, x, lengths, pattern)
        print(f"{name}: out {out.shape}, share of dense work by head {density[0].round(3).tolist()}")


if __name__ == "__main__":
    main()

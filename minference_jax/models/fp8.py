"""Linear layers whose products are of 8-bit floating-point numbers: float8_e4m3fn, 3 bits of mantissa, at most 448.

Weights are quantised once for each output feature, activations for each token as it comes; each row of either has one
scale that takes its largest number to 448. So the product itself is of plain 8-bit matrices, and both scales come after
it. Kernels lie as [out, in]: with both operands contiguous along what is summed, the form that cuBLASLt takes on
Hopper, nothing is transposed at run time. Where a device has no 8-bit units XLA widens both operands, which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minference_jax.implementations import device_of
from minference_jax.models.layers import Linear

LINEAR = ("fp8",)
"""How linear layers can be computed, beside in the model's own dtype."""
FP8 = jnp.float8_e4m3fn
LARGEST = 448.0
"""The largest number of FP8; what is rounded beyond 464 is NaN there."""
ALGORITHM = jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM
"""Of products on 8-bit units. The same without FAST_ACCUM sums in float32, in more time."""
CAN_NAME_ALGORITHM = jax.__version_info__ < (0, 12)
"""Whether jax hands an algorithm of FP8 to its CUDA plugin; 0.12.0 fails to ("failed to legalize")."""
_UNITS_FROM = (8, 9)  # compute capability: NVIDIA's Ada, then Hopper
WEIGHT, SCALE = ".weight", ".weight_scale"  # how the names of an Fp8Linear's parameters end
_KERNEL = ".kernel"  # and that of a Linear


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows as 8-bit numbers and their scales: x is about the product of both.

    A row of zeros gives zeros. A row with a NaN or an infinity gives NaN.

    Args:
        x: [..., n], any floating-point dtype.

    Returns:
        float8_e4m3fn [..., n], rounded to the nearest, and the scale float32 [..., 1] of each row.
    """
    exact = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=-1, keepdims=True)
    scale = jnp.maximum(largest / LARGEST, jnp.finfo(jnp.float32).tiny)
    return jnp.clip(exact / scale, -LARGEST, LARGEST).astype(FP8), scale


def _multiply(rows: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """8-bit rows [..., in] times 8-bit weight [out, in], in `dtype`.

    Where the device has 8-bit units the product names the algorithm that only cuBLASLt has: XLA would else compile and
    time tens of Triton kernels for it. Of a single row XLA makes no matrix product, and knows no such algorithm.
    """
    contracted = (((rows.ndim - 1,), (1,)), ((), ()))
    plain = partial(jax.lax.dot_general, dimension_numbers=contracted, preferred_element_type=dtype)
    device = device_of()
    has_units = device.platform == "cuda" and (device.compute_capability or (0, 0)) >= _UNITS_FROM
    if not (has_units and CAN_NAME_ALGORITHM) or rows.size == rows.shape[-1]:
        return plain(rows, weight)
    return jax.lax.platform_dependent(rows, weight, cuda=partial(plain, precision=ALGORITHM), default=plain)


class Fp8Linear(nnx.Module):
    """x @ weight.T of 8-bit numbers, times the scales of both, plus a bias where there is one; see the module.

    The product comes in the dtype of x (of a float16 x, whose range is too small, in float32), summed in float32, but
    by Hopper's 8-bit units in fewer bits. It is scaled, and the bias added, in float32.

    Args:
        weight: float8_e4m3fn [out, in].
        weight_scale: float32 [out].
        bias: [out]; None = there is none.
    """

    def __init__(self, weight: Any, weight_scale: Any, bias: Any = None):
        self.weight = nnx.Param(weight)
        self.weight_scale = nnx.Param(weight_scale)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out] in the dtype of x."""
        rows, row_scale = quantize_rows(x)
        dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype
        product = _multiply(rows, self.weight[...], dtype)
        out = product.astype(jnp.float32) * (row_scale * self.weight_scale[...])
        return (out if self.bias is None else out + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def quantize_kernel(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A kernel [..., in, out] as the weight float8_e4m3fn [..., out, in] and weight_scale float32 [..., out]."""
    weight, scale = quantize_rows(jnp.swapaxes(kernel, -1, -2))
    return weight, scale[..., 0]


@jax.jit
def _quantize_layers(kernels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`quantize_kernel` of stacked kernels [L, in, out], one layer at a time: its float32 copy takes memory."""
    return jax.lax.map(quantize_kernel, kernels)


def is_quantized(name: str) -> bool:
    """Whether `quantize_parameters` quantises the parameter of this name: the kernel of a linear layer of a layer."""
    return name.startswith("layers.") and name.endswith(_KERNEL)


def quantize_parameters(parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters by name, the kernel of every linear layer under `layers.` as 8-bit `weight` and its `weight_scale`.

    Embeddings, norms, biases and lm_head stay as they are; nothing but kernels is copied.

    Args:
        parameters: some or all of a model's, as `parameters_of` gives them.
    """
    quantized: dict[str, jax.Array] = {}
    for name, array in parameters.items():
        if is_quantized(name):
            weight, scale = _quantize_layers(array)
            stem = name.removesuffix(_KERNEL)
            quantized |= {stem + WEIGHT: weight, stem + SCALE: scale}
        else:
            quantized[name] = array
    return quantized


def replace_linear(layers: nnx.Module) -> None:
    """Puts an `Fp8Linear` of shapes in the place of every `Linear` in stacked layers of shapes."""
    for _, module in list(nnx.iter_modules(layers)):
        for name, child in list(vars(module).items()):
            if isinstance(child, Linear):
                count, size, out_size = child.kernel.shape
                weight = jax.ShapeDtypeStruct((count, out_size, size), FP8)
                scale = jax.ShapeDtypeStruct((count, out_size), jnp.float32)
                setattr(module, name, Fp8Linear(weight, scale, None if child.bias is None else child.bias.get_value()))


def linear_of(model: Any) -> str | None:
    """How a decoder's linear layers are computed: one of `LINEAR`, or None where it is in the model's dtype."""
    return "fp8" if any(isinstance(module, Fp8Linear) for _, module in nnx.iter_modules(model.layers)) else None


def check_linear(linear: str | None) -> None:
    """Refuses, with ValueError, what is neither None nor one of `LINEAR`."""
    if linear is not None and linear not in LINEAR:
        raise ValueError(f'{linear=} must be "fp8", or None for linear layers in the model\'s dtype')

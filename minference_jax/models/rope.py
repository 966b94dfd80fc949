"""Rotary position embedding: the frequencies of every supported scaling, and the rotation itself.

Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071) for `yarn` and the NTK-aware rules; LongRoPE (arXiv
2402.13753) for `longrope`; the frequencies agree with those of transformers' `modeling_rope_utils`. Unlike there,
`dynamic` and `longrope` keep no state: a row's frequencies depend on that row's own length at the call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor"),
}
_LONGROPE = ("long_factor", "short_factor")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions turn into rotations. A field that `rope_type` does not use must stay None.

    Attributes:
        rope_type: "default", "linear", "dynamic", "llama3", "yarn" or "longrope".
        rope_theta: base of the wavelengths.
        partial_rotary_factor: share of each head's dimensions that turn, the first ones; above 0, at most 1.
        interleaved: whether dimensions (2i, 2i + 1) turn together, as in GLM, instead of (i, i + half).
        factor: how many times longer the context is made (all types but default); longrope: None = the model's
            max_position_embeddings over the original.
        low_freq_factor, high_freq_factor: llama3: the original context holds this many wavelengths where the scaling is
            full, and where it ends.
        original_max_position_embeddings: llama3, yarn: context before scaling, in tokens; None = the model's
            max_position_embeddings. longrope: rows longer than this use long_factor, others short_factor.
        attention_factor: yarn, longrope: what cos and sin are multiplied with; None = derived from factor (and mscale).
        beta_fast, beta_slow: yarn: rotations over the original context above which nothing is scaled, and below
            which all is; None = 32 and 1.
        mscale, mscale_all_dim: yarn: weights of log(factor) in the derived attention_factor; None = not used.
        truncate: yarn: whether the bounds of the ramp are rounded to whole dimensions; None = True.
        short_factor, long_factor: longrope: how much longer each wavelength is made, one number for each turned pair.

    Raises:
        ValueError: an unknown rope_type, a missing field, one that the type does not use, or one out of range.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    interleaved: bool = False
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        kind = self.rope_type
        if kind not in _REQUIRED:
            raise ValueError(f"rope_type={kind!r} is not supported; the supported types are {', '.join(_REQUIRED)}")
        used = _REQUIRED[kind] + _OPTIONAL.get(kind, ())
        for field in fields(self)[4:]:
            value = getattr(self, field.name)
            if value is None and field.name in _REQUIRED[kind]:
                raise ValueError(f"rope_type={kind!r} needs {field.name}")
            if value is not None and field.name not in used:
                raise ValueError(f"rope_type={kind!r} does not use {field.name}={value!r}; leave it None")
            numbers = value if isinstance(value, tuple) else (value,)
            if value is not None and field.name != "truncate" and not all(number > 0 for number in numbers):
                raise ValueError(f"{field.name}={value!r} of rope_type={kind!r} must be positive")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta={self.rope_theta!r} must be positive")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor={self.partial_rotary_factor!r} must lie above 0 and be at most 1")
        if kind == "llama3" and not self.given("high_freq_factor") > self.given("low_freq_factor"):
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}"
            )
        if kind == "yarn" and (self.beta_fast or 32) < (self.beta_slow or 1):
            raise ValueError(f"beta_fast={self.beta_fast or 32} must not be below beta_slow={self.beta_slow or 1}")

    def given(self, name: str) -> Any:
        """A field that this rope_type requires, and so has."""
        return getattr(self, name)

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's dimensions turn.

        Raises:
            ValueError: they do not make pairs, or the factors of longrope are not as many as the pairs.
        """
        size = int(head_dim * self.partial_rotary_factor)
        if size % 2 or size == 0:
            share = f" with partial_rotary_factor={self.partial_rotary_factor}"
            raise ValueError(f"{head_dim=}{share} turns {size} dimensions: they must be pairs")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != size // 2:
                raise ValueError(f"{name} has {len(factors)} numbers, {size} turned dimensions need {size // 2}")
        return size


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, kv_len: jax.Array
) -> tuple[jax.Array | np.ndarray, float]:
    """Radians per token of each rotated pair, and the factor that cos and sin are multiplied with.

    Args:
        rope: the scaling.
        head_dim: R, the dimensions that turn; even.
        max_position_embeddings: the model's context in tokens.
        kv_len: int32 [B], true tokens of each row with the new ones; only `dynamic` and `longrope` look at it.

    Returns:
        float32 [R // 2], or [B, R // 2] for `dynamic` and `longrope`; and the factor.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if rope.rope_type == "dynamic":
        return _dynamic(rope, head_dim, max_position_embeddings, kv_len, exponents), 1.0
    wavelength = np.float32(rope.rope_theta) ** exponents  # over 2 pi, in tokens
    inv_freq = np.float32(1) / wavelength
    original = rope.original_max_position_embeddings or max_position_embeddings
    if rope.rope_type == "linear":
        return inv_freq / np.float32(rope.given("factor")), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq, original), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, wavelength, original), _yarn_attention_factor(rope)
    if rope.rope_type == "longrope":
        is_long = (kv_len > original)[:, None]
        long, short = (np.float32(1) / (np.asarray(rope.given(name), np.float32) * wavelength) for name in _LONGROPE)
        return jnp.where(is_long, long, short), _longrope_attention_factor(rope, max_position_embeddings)
    return inv_freq, 1.0


def _dynamic(rope, head_dim, max_position_embeddings, kv_len, exponents) -> jax.Array:
    """NTK-aware base change: a row past the model's context gets a larger base, a shorter row the original one."""
    if head_dim <= 2:
        raise ValueError(f"{head_dim=} must exceed 2 for rope_type='dynamic'")
    length = jnp.maximum(kv_len, max_position_embeddings).astype(jnp.float32)
    factor = rope.given("factor")
    stretch = factor * length / max_position_embeddings - (factor - 1)
    base = rope.rope_theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base[:, None] ** exponents


def _llama3(rope: RopeConfig, inv_freq: np.ndarray, original: int) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones stay, a ramp linear in frequency lies between."""
    low, high = rope.given("low_freq_factor"), rope.given("high_freq_factor")
    rotations = original * inv_freq / (2 * math.pi)  # whole turns over the original context
    blend = (rotations - low) / (high - low)
    kept = np.clip(blend, 0.0, 1.0).astype(np.float32)
    return (1 - kept) * inv_freq / np.float32(rope.given("factor")) + kept * inv_freq


def _yarn(rope: RopeConfig, wavelength: np.ndarray, original: int) -> np.ndarray:
    """Frequencies that turn often over the original context stay, slow ones are interpolated, a ramp lies between."""
    pairs = len(wavelength)
    head_dim = 2 * pairs

    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast or 32), dimension_of(rope.beta_slow or 1)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # a ramp of no width would divide by zero
    interpolated = np.clip((np.arange(pairs, dtype=np.float32) - low) / width, 0, 1).astype(np.float32)
    stretched = 1 / (np.float32(rope.given("factor")) * wavelength)
    return stretched * interpolated + (1 / wavelength) * (1 - interpolated)


def _longrope_attention_factor(rope: RopeConfig, max_position_embeddings: int) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    original = rope.given("original_max_position_embeddings")
    factor = max_position_embeddings / original if rope.factor is None else rope.factor
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    factor = rope.given("factor")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def rotation_angles(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array, kv_len: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position, float32 [B, T, R // 2] each, times the attention factor.

    Args:
        rope, head_dim, max_position_embeddings: as in `inverse_frequencies`.
        positions: int32 [B, T], absolute positions of the new tokens.
        kv_len: int32 [B], true tokens of each row with the new ones.
    """
    inv_freq, attention_factor = inverse_frequencies(rope, head_dim, max_position_embeddings, kv_len)
    inv_freq = jnp.asarray(inv_freq, jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * (inv_freq[:, None] if inv_freq.ndim == 2 else inv_freq)
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


class Rotation(NamedTuple):
    """How the heads of some tokens turn; see `rotate`.

    Attributes:
        cos, sin: float32 [B, T, R // 2].
        interleaved: whether the pairs are (2i, 2i + 1) instead of (i, i + R // 2).
    """

    cos: jax.Array
    sin: jax.Array
    interleaved: bool


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotates the first R dimensions of x [..., N, H] in pairs; computed in float32, returned in x's dtype.

    Args:
        x: queries or keys [..., N, H].
        cos, sin: float32 [..., R // 2], from `rotation_angles`; R is at most H.
        interleaved: whether the pairs are (2i, 2i + 1) instead of (i, i + R // 2).
    """
    cos, sin = cos[..., None, :], sin[..., None, :]
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
    if interleaved:
        pair = [jnp.stack(pair, axis=-1).reshape(turned.shape)]
    return jnp.concatenate([*pair, rest], axis=-1)

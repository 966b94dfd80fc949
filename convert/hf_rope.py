"""The position embedding of a Hugging Face config, in either of its two forms."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from minference_jax.models import RopeConfig

_LISTS = ("short_factor", "long_factor")
_OLD_LONGROPE = ("su", "yarn")  # what longrope was called in the first Phi-3 files


def read_rope(config: Mapping[str, Any], partial_rotary_factor: float | None, *, interleaved: bool) -> RopeConfig:
    """The position embedding, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    Args:
        config: content of config.json.
        partial_rotary_factor: share of a head that turns where the config does not say it; None = heads always turn
            whole.
        interleaved: whether neighbouring dimensions turn together.

    Raises:
        ValueError: fields that are unknown, of a wrong type, or contradict each other.
    """
    newer, older = (_rope_fields(config, name) for name in ("rope_parameters", "rope_scaling"))
    theta = _one_value(config, newer, older, "rope_theta")
    share = _one_value(config, newer, older, "partial_rotary_factor")
    if newer and older and newer != older:
        raise ValueError(f"rope_parameters {newer!r} contradicts rope_scaling {older!r}")
    for name, value in (("rope_theta", theta), ("partial_rotary_factor", share)):
        if value is not None and not is_number(value):
            raise ValueError(f"{name}={value!r} must be a number")
    if partial_rotary_factor is None and share not in (None, 1):
        raise ValueError(f"partial_rotary_factor={share!r} is not supported, only 1")
    rope = newer or older
    if config["model_type"] == "phi3":
        _complete_phi3(rope, config)
    return RopeConfig(
        rope_theta=RopeConfig.rope_theta if theta is None else float(theta),
        partial_rotary_factor=float((partial_rotary_factor or 1.0) if share is None else share),
        interleaved=interleaved,
        **rope,
    )


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _one_value(config: Mapping[str, Any], newer: dict[str, Any], older: dict[str, Any], name: str) -> Any:
    """A field that may stand in three places, removed from two of them."""
    value = config.get(name)
    for place, given in (("rope_parameters", newer), ("rope_scaling", older)):
        inner = given.pop(name, None)
        if value is not None and inner is not None and value != inner:
            raise ValueError(f"{name}={value!r} contradicts {place} with {name}={inner!r}")
        value = inner if value is None else value
    return value


def _complete_phi3(rope: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Phi-3 keeps the original context outside, and knows no scaling but longrope."""
    if rope.get("rope_type") in _OLD_LONGROPE:
        rope["rope_type"] = "longrope"
    if rope.get("rope_type", "default") not in ("default", "longrope"):
        raise ValueError(f"rope_type={rope['rope_type']!r} is not supported for model_type phi3, only 'longrope'")
    original = config.get("original_max_position_embeddings")
    if original is None or rope.get("rope_type") != "longrope":
        return
    if rope.setdefault("original_max_position_embeddings", original) != original:
        raise ValueError(f"original_max_position_embeddings={original!r} contradicts that of the rope: {rope!r}")


def _rope_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """One of the two forms in RopeConfig's names, without nulls; empty where the config does not have it."""
    given = config.get(source)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{source}={given!r} must be an object or null")
    rope = {name: value for name, value in given.items() if value is not None}
    kind, older_kind = rope.get("rope_type"), rope.pop("type", None)
    if kind is not None and older_kind is not None and kind != older_kind:
        raise ValueError(f"{source} has both rope_type={kind!r} and type={older_kind!r}")
    rope["rope_type"] = kind or older_kind or "default"
    if not isinstance(rope["rope_type"], str):
        raise ValueError(f"{source}: rope_type={rope['rope_type']!r} must be a string")
    known = {field.name for field in fields(RopeConfig)} - {"interleaved"}
    for name, value in rope.items():
        if name not in known:
            raise ValueError(f"{source}: {name}={value!r} is not a field this converter knows")
        if name in _LISTS:
            if not isinstance(value, list) or not all(map(is_number, value)):
                raise ValueError(f"{source}: {name}={value!r} must be an array of numbers")
            rope[name] = tuple(float(number) for number in value)
        elif name not in ("rope_type", "truncate") and not is_number(value):
            raise ValueError(f"{source}: {name}={value!r} must be a number")
    if not isinstance(rope.get("truncate", True), bool):
        raise ValueError(f"{source}: truncate={rope['truncate']!r} must be true or false")
    return rope

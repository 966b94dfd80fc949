"""Which Hugging Face tensor is which of our parameters: a table, applied strictly in both directions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from minference_jax.convert.weight_source import TensorInfo, WeightSource
from minference_jax.models.llama import LlamaConfig
from minference_jax.models.parameters import parameter_shapes

STACKED = "layers."  # our names that hold all layers on a leading axis

# Our name -> Hugging Face's; {} is the layer. Kernels are [in, out] here and [out, in] there.
_TABLE: dict[str, str] = {
    "embed.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
    "layers.input_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.post_attention_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
}
for _part, _theirs, _projections in (("attention", "self_attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down"))):
    for _projection in _projections:
        for _ours, _suffix in (("kernel", "weight"), ("bias", "bias")):
            _TABLE[f"layers.{_part}.{_projection}_proj.{_ours}"] = (
                f"model.layers.{{}}.{_theirs}.{_projection}_proj.{_suffix}"
            )

_PATTERNS = [
    (re.compile(re.escape(theirs).replace(r"\{\}", "(0|[1-9][0-9]*)")), ours) for ours, theirs in _TABLE.items()
]

# Buffers that older files carry; the model computes them from the config, as transformers does.
_DERIVED = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")


class WeightError(ValueError):
    """The tensors of a source are not those of its config.

    Attributes:
        unmatched: names in the source that the model has no place for.
        missing: names that the model needs and the source does not have.
        misshapen: name -> (shape there, shape needed).
    """

    def __init__(
        self,
        source: str,
        *,
        unmatched: list[str],
        missing: list[str],
        misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ):
        self.unmatched, self.missing, self.misshapen = unmatched, missing, misshapen
        lines = [f"  unmatched: {name}" for name in unmatched] + [f"  missing: {name}" for name in missing]
        lines += [
            f"  misshapen: {name} is {list(have)}, needs {list(need)}" for name, (have, need) in misshapen.items()
        ]
        super().__init__(f"the weights of {source} do not fit its config:\n" + "\n".join(lines))


class Parameter(NamedTuple):
    """One stored parameter: our name, its layer (None outside the layers), and the tensor it comes from.

    shape is that of one layer, in our layout.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    tensor: str

    @property
    def key(self) -> str:
        """The name in a checkpoint: of layers.attention.q_proj.kernel in layer 3, layers.3.attention.q_proj.kernel."""
        return layer_key(self.name, self.layer)

    def read(self, source: WeightSource) -> np.ndarray:
        """The parameter in our layout: kernels are transposed (a view), all else is as stored."""
        array = source.read(self.tensor)
        return array.T if self.name.endswith(".kernel") else array


def layer_key(name: str, layer: int | None) -> str:
    """The key of one layer of a parameter in a checkpoint; layer None for one outside the layers."""
    return name if layer is None else f"{STACKED}{layer}.{name.removeprefix(STACKED)}"


def layers_of(config: LlamaConfig, name: str) -> list[int | None]:
    """The layers in which a parameter is stored: all of them, or [None] for one outside the layers."""
    return list(range(config.num_layers)) if name.startswith(STACKED) else [None]


def match_weights(source: WeightSource, config: LlamaConfig) -> list[Parameter]:
    """Pairs every parameter of the model with the one tensor that holds it.

    Args:
        source: whose tensors to use; a separate lm_head of a tied model is read to make sure that it is the embedding.
        config: read from source.config.

    Raises:
        WeightError: lists every tensor without a place, every missing and every misshapen one.
    """
    shapes = parameter_shapes(config)
    wanted: dict[tuple[str, int | None], Parameter] = {}
    for name, shape in shapes.items():
        for layer in layers_of(config, name):
            one = shape if layer is None else shape[1:]
            wanted[name, layer] = Parameter(name, layer, one, _TABLE[name].format(layer))
    unmatched, misshapen, found = [], {}, set()
    for tensor, info in source.tensors.items():
        place = _place_of(tensor)
        if place in wanted:
            found.add(place)
            need = wanted[place].shape[::-1] if place[0].endswith(".kernel") else wanted[place].shape
            if info.shape != need:
                misshapen[tensor] = (info.shape, need)
        elif not _DERIVED.fullmatch(tensor) and not _is_tied_copy(source, config, tensor):
            unmatched.append(tensor)
    missing = [parameter.tensor for place, parameter in wanted.items() if place not in found]
    if unmatched or missing or misshapen:
        raise WeightError(source.name, unmatched=sorted(unmatched), missing=missing, misshapen=misshapen)
    return list(wanted.values())


def _place_of(tensor: str) -> tuple[str, int | None]:
    """Our name and layer for a Hugging Face name; ("", None) where the table has none."""
    for pattern, ours in _PATTERNS:
        if match := pattern.fullmatch(tensor):
            return ours, int(match[1]) if pattern.groups else None
    return "", None


def _is_tied_copy(source: WeightSource, config: LlamaConfig, tensor: str) -> bool:
    """Whether a tied model's file repeats the embedding as lm_head, bit for bit."""
    embedding, head = _TABLE["embed.embedding"], _TABLE["lm_head.kernel"]
    if tensor != head or not config.tie_embeddings or source.tensors.get(embedding) != source.tensors[head]:
        return False
    # compared by digest, so that only one of the two is in memory
    return _digest(source.read(embedding)) == _digest(source.read(head))


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()


def stored_tensors(parameters: list[Parameter], source: WeightSource) -> Mapping[str, TensorInfo]:
    """Shape and dtype of the tensors that the parameters come from."""
    return {parameter.tensor: source.tensors[parameter.tensor] for parameter in parameters}

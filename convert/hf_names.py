"""Where our parameters stand in a Hugging Face checkpoint: the name of the tensor, and the rows where it holds several.

Kernels are [in, out] here and [out, in] there.
"""

from __future__ import annotations

from typing import NamedTuple

from minference_jax.models import DecoderConfig, GlmConfig, Phi3Config, parameter_shapes

STACKED = "layers."  # our names that hold all layers on a leading axis
KERNEL = ".kernel"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # as Hugging Face names them

# Our name -> Hugging Face's; {} is the layer.
_NAMES: dict[str, str] = {
    "embed.embedding": EMBEDDING,
    "final_norm.scale": "model.norm.weight",
    "lm_head.kernel": HEAD,
    "layers.input_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.post_attention_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.attention_output_norm.scale": "model.layers.{}.post_self_attn_layernorm.weight",
    "layers.mlp_output_norm.scale": "model.layers.{}.post_mlp_layernorm.weight",
    "layers.attention.q_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attention.k_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
}
for _part, _theirs, _projections in (("attention", "self_attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down"))):
    for _projection in _projections:
        for _ours, _suffix in ((KERNEL, ".weight"), (".bias", ".bias")):
            _NAMES[f"layers.{_part}.{_projection}_proj{_ours}"] = (
                f"model.layers.{{}}.{_theirs}.{_projection}_proj{_suffix}"
            )

_GATE_UP = ("layers.mlp.gate_proj.kernel", "layers.mlp.up_proj.kernel"), "model.layers.{}.mlp.gate_up_proj.weight"
_QKV = (
    tuple(f"layers.attention.{letter}_proj.kernel" for letter in "qkv"),
    "model.layers.{}.self_attn.qkv_proj.weight",
)
# Parameters that share a tensor, one below the other in this order.
_FUSED: dict[type[DecoderConfig], tuple[tuple[tuple[str, ...], str], ...]] = {
    Phi3Config: (_QKV, _GATE_UP),
    GlmConfig: (_GATE_UP,),
}


class Parameter(NamedTuple):
    """One stored parameter and where it comes from.

    Attributes:
        name: ours.
        layer: its layer; None outside the layers.
        shape: of one layer, in our layout.
        tensor: the Hugging Face tensor.
        start: its first row there.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    tensor: str
    start: int = 0

    @property
    def key(self) -> str:
        """The name in a checkpoint: of layers.attention.q_proj.kernel in layer 3, layers.3.attention.q_proj.kernel."""
        return layer_key(self.name, self.layer)

    @property
    def is_kernel(self) -> bool:
        """Whether it is stored turned round, [out, in]."""
        return self.name.endswith(KERNEL)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in Hugging Face's layout."""
        return self.shape[::-1] if self.is_kernel else self.shape


def layer_key(name: str, layer: int | None) -> str:
    """The key of one layer of a parameter in a checkpoint; layer None for one outside the layers."""
    return name if layer is None else f"{STACKED}{layer}.{name.removeprefix(STACKED)}"


def layers_of(config: DecoderConfig, name: str) -> list[int | None]:
    """The layers in which a parameter is stored: all of them, or [None] for one outside the layers."""
    return list(range(config.num_layers)) if name.startswith(STACKED) else [None]


def hf_tensors(config: DecoderConfig) -> dict[str, list[Parameter]]:
    """Every tensor of a model's Hugging Face checkpoint, with the parameters that it holds from its first row down."""
    shapes = parameter_shapes(config)
    groups = [(names, tensor) for names, tensor in _FUSED.get(type(config), ())]
    fused = {name for names, _ in groups for name in names}
    groups += [((name,), _NAMES[name]) for name in shapes if name not in fused]
    tensors: dict[str, list[Parameter]] = {}
    for names, template in groups:
        for layer in layers_of(config, names[0]):
            tensor, start = template.format(layer), 0
            tensors[tensor] = []
            for name in names:
                shape = shapes[name] if layer is None else shapes[name][1:]
                tensors[tensor].append(Parameter(name, layer, shape, tensor, start))
                start += tensors[tensor][-1].stored_shape[0]
    return tensors


def hf_shape(parameters: list[Parameter]) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor that holds these parameters, in its own layout."""
    return (sum(parameter.stored_shape[0] for parameter in parameters), *parameters[0].stored_shape[1:])

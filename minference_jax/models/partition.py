"""How parameters are split over the devices of a mesh: by heads and by the inner features of the MLP."""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from minference_jax.models.config import DecoderConfig
from minference_jax.models.parameters import parameter_shapes

_SPLIT_OUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_SPLIT_IN = ("o_proj", "down_proj")


def parameter_shardings(
    config: DecoderConfig, mesh: Mesh | AbstractMesh, axis: str = "model"
) -> dict[str, NamedSharding]:
    """The sharding of every parameter: attention by heads, the MLP by inner features, vocabulary matrices by tokens.

    Norms are on every device whole. So are the projections of k and v where the KV heads can't be shared out equally,
    and embedding and lm_head where the vocabulary can't.

    Args:
        config: of the model.
        mesh: the devices.
        axis: the mesh axis over which parameters are split; along the others they are copied.

    Returns:
        name -> NamedSharding for the names of `parameter_shapes(config)`.

    Raises:
        ValueError: it is no mesh, it has no such axis, or its size does not divide the query heads and inner features.

    Source: Megatron-LM (arXiv 1909.08053), section 3.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"{mesh=} must be a jax.sharding.Mesh")
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has the axes {tuple(mesh.shape)}, none is called {axis!r}")
    count = mesh.shape[axis]
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % count:
            raise ValueError(f"{name}={getattr(config, name)} can't be split over {count} devices equally")

    def spec(name: str, ndim: int) -> PartitionSpec:
        module, leaf = name.split(".")[-2:]
        sides: list[str | None] = [None] * ndim
        whole_kv = module in ("k_proj", "v_proj") and config.num_kv_heads % count
        whole_vocabulary = module in ("embed", "lm_head") and config.vocab_size % count
        if whole_kv or whole_vocabulary:
            pass
        elif module in _SPLIT_OUT:
            sides[-1] = axis
        elif module == "embed" or (module in _SPLIT_IN and leaf == "kernel"):
            sides[-2] = axis
        return PartitionSpec(*sides)

    return {name: NamedSharding(mesh, spec(name, len(shape))) for name, shape in parameter_shapes(config).items()}

"""What search and inspection share: a model's layers one at a time, and what a pattern makes of each head."""

from minference_jax.analysis.activations import LayerActivations, activation_bytes, read_layers
from minference_jax.analysis.heads import (
    SparseSettings,
    head_densities,
    head_errors,
    head_layouts,
    settings_for,
    sparse_outputs,
)

__all__ = [
    "LayerActivations",
    "SparseSettings",
    "activation_bytes",
    "head_densities",
    "head_errors",
    "head_layouts",
    "read_layers",
    "settings_for",
    "sparse_outputs",
]

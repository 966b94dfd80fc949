"""Phi-3 and Phi-4-mini: a LLaMA without biases, with longrope and heads of 96 or of which a part turns.

Checkpoints fuse q, k and v, and gate and up, in one matrix each; here they are apart, as in all our models.
Source: the Phi-3 technical report (arXiv 2404.14219); numbers agree with transformers' PyTorch Phi-3.
"""

from __future__ import annotations

from dataclasses import dataclass

from minference_jax.models.config import DecoderConfig
from minference_jax.models.decoder import Decoder
from minference_jax.models.layers import PreNormLayer


@dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """Shape of a Phi-3; it has no switches of its own.

    Raises:
        ValueError: as `DecoderConfig`.
    """


class Phi3(Decoder):
    """A Phi-3 with random parameters; arguments and call as in `Decoder`."""

    layer_type = PreNormLayer

"""Pairs the tensors of a source with our parameters, strictly in both directions, and reads them."""

from __future__ import annotations

import re

import numpy as np

from minference_jax.convert.hf_names import EMBEDDING, HEAD, Parameter, hf_shape, hf_tensors
from minference_jax.convert.weight_source import DTYPES, PART_BYTES, WeightSource, turned
from minference_jax.models import DecoderConfig

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


def match_weights(source: WeightSource, config: DecoderConfig) -> list[Parameter]:
    """Pairs every parameter of the model with the one tensor that holds it.

    Args:
        source: whose tensors to use; a separate lm_head of a tied model is read to make sure that it is the embedding.
        config: read from source.config.

    Raises:
        WeightError: lists every tensor without a place, every missing and every misshapen one.
    """
    wanted = hf_tensors(config)
    unmatched = [
        tensor
        for tensor in source.tensors
        if tensor not in wanted and not _DERIVED.fullmatch(tensor) and not _is_tied_copy(source, config, tensor)
    ]
    missing = [tensor for tensor in wanted if tensor not in source.tensors]
    misshapen = {
        tensor: (source.tensors[tensor].shape, hf_shape(parameters))
        for tensor, parameters in wanted.items()
        if tensor in source.tensors and source.tensors[tensor].shape != hf_shape(parameters)
    }
    if unmatched or missing or misshapen:
        raise WeightError(source.name, unmatched=sorted(unmatched), missing=missing, misshapen=misshapen)
    return [parameter for parameters in wanted.values() for parameter in parameters]


def read_parameter(source: WeightSource, parameter: Parameter) -> np.ndarray:
    """One layer of a parameter in our layout: kernels are turned round, all else is as stored."""
    array = source.read(parameter.tensor, parameter.start, parameter.start + parameter.stored_shape[0])
    return turned(array) if parameter.is_kernel else array


def _is_tied_copy(source: WeightSource, config: DecoderConfig, tensor: str) -> bool:
    """Whether a tied model's file repeats the embedding as lm_head, bit for bit."""
    if tensor != HEAD or not config.tie_embeddings or source.tensors.get(EMBEDDING) != source.tensors[HEAD]:
        return False
    rows, features = source.tensors[HEAD].shape
    step = max(1, PART_BYTES // (features * source.tensors[HEAD].dtype.itemsize)) if source.reads_rows else rows
    for begin in range(0, rows, step):
        embedding, head = (source.read(name, begin, begin + step).tobytes() for name in (EMBEDDING, HEAD))
        if embedding != head:
            return False
    return True


def stored_dtype(source: WeightSource, parameters: list[Parameter]) -> np.dtype:
    """The narrowest dtype that holds all parameters exactly: their own where they agree, float32 where they differ."""
    found = {source.tensors[parameter.tensor].dtype for parameter in parameters}
    return found.pop() if len(found) == 1 else DTYPES["float32"]

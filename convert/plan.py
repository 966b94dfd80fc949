"""What a conversion would do, without doing it: names, shapes, bytes, and what would be refused."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from minference_jax.convert.checkpoint import check_destination, save_small_files
from minference_jax.convert.hf_config import read_config
from minference_jax.convert.hf_names import hf_tensors
from minference_jax.convert.hf_weights import match_weights, stored_dtype
from minference_jax.convert.sources import locate, open_source
from minference_jax.convert.weight_source import read_dtype
from minference_jax.models import DecoderConfig, parameter_shapes
from minference_jax.patterns.registry import resolve_patterns


class PlannedParameter(NamedTuple):
    """One parameter of the model, all layers together.

    Attributes:
        name: ours.
        shape: stacked over the layers, in our layout.
        nbytes: of all layers, in the dtype of the checkpoint; 0 where that is not known.
        tensor: the tensor it comes from; {} stands for the layer.
        rows: which rows of that tensor, where it holds several parameters; None = all.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    tensor: str
    rows: tuple[int, int] | None


class ConversionPlan(NamedTuple):
    """What a conversion would write.

    Attributes:
        config: of the model; None where it is refused.
        dtype: of the weights; None where they are refused.
        parameters: in the order of the model; empty where config is None.
        refusals: why it would be refused, one sentence each; empty = it would not.
    """

    config: DecoderConfig | None
    dtype: str | None
    parameters: list[PlannedParameter]
    refusals: list[str]

    @property
    def nbytes(self) -> int:
        """Size of all weights."""
        return sum(parameter.nbytes for parameter in self.parameters)


def plan_conversion(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    patterns: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ConversionPlan:
    """Reads config, headers and tokenizer of a model, and checks what `convert_model` checks before it writes.

    What only reading all weights can tell is not found: bytes that are missing inside a file, numbers that the dtype
    can't hold.

    Args:
        source, destination, dtype, patterns, overwrite: as in `convert_model`; destination None = it is not checked.

    Raises:
        ValueError: no such model, a hub id that is not downloaded yet, or an unknown dtype.
    """
    chosen, path = read_dtype(dtype), locate(source, download=False)
    config: DecoderConfig | None = None
    refusals: list[str] = []
    if destination is not None:
        with _collected(refusals):
            check_destination(Path(destination).absolute(), overwrite)
    with _collected(refusals), closing(open_source(path)) as opened:
        with _collected(refusals):
            config = read_config(opened.config)
            weights = match_weights(opened, config)
            chosen = chosen or stored_dtype(opened, weights)
        with _collected(refusals), tempfile.TemporaryDirectory() as folder:
            save_small_files(opened, Path(folder))
        if patterns is not None:
            with _collected(refusals):
                chosen_file = resolve_patterns(patterns, source, opened.config)
                if config is not None:
                    chosen_file.patterns.check(config.num_layers, config.num_heads)
    size = 0 if chosen is None else chosen.itemsize
    parameters = [] if config is None else _parameters(config, size)
    return ConversionPlan(config, None if chosen is None else chosen.name, parameters, refusals)


def _parameters(config: DecoderConfig, itemsize: int) -> list[PlannedParameter]:
    shapes = parameter_shapes(config)
    planned = []
    for tensor, parts in hf_tensors(config).items():
        for part in parts:
            if part.layer in (None, 0):
                rows = None if len(parts) == 1 else (part.start, part.start + part.stored_shape[0])
                template = tensor.replace(".0.", ".{}.") if part.layer == 0 else tensor
                shape = shapes[part.name]
                planned.append(PlannedParameter(part.name, shape, math.prod(shape) * itemsize, template, rows))
    return planned


@contextmanager
def _collected(refusals: list[str]) -> Iterator[None]:
    """Takes down why a step refuses, and goes on."""
    try:
        yield
    except OSError as error:
        refusals.append(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValueError as error:
        refusals.append(str(error))

"""`minference-jax bench prefill`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path, PurePath

from minference_jax.bench.prefill import PrefillBench, Subject
from minference_jax.bench.random_model import first_layers, first_patterns, random_model
from minference_jax.bench.records import append, read
from minference_jax.bench.shapes import SHAPES
from minference_jax.cli.inputs import check_pattern_option, choose_attention, load_model
from minference_jax.convert.hf_config import read_config
from minference_jax.loading import choose_tiles
from minference_jax.measure.energy import open_counter
from minference_jax.patterns import uniform_patterns
from minference_jax.patterns.registry import resolve_patterns

_DTYPE = "bfloat16"  # of random weights


def run(arguments: argparse.Namespace) -> None:
    """Prints each record as a JSON line as soon as it is measured, and appends it to the file where one is named.

    What does not fit the device is said in one sentence each, and the other cases go on.

    Raises:
      ValueError, NotImplementedError, OSError: what the options ask for can't be had.
      SystemExit: with code 1, where something did not fit.
    """
    output = None if arguments.output is None else Path(arguments.output)
    if arguments.resume and output is None:
        raise ValueError("--resume needs --output, the file to go on with")
    there = read(output) if arguments.resume and output is not None and output.exists() else []
    attention = choose_attention(arguments)
    bench = PrefillBench(
        _of_shape(arguments) if arguments.model is None else _of_model(arguments),
        attention,
        implementation=arguments.implementation,
        chunk_size=arguments.chunk_size,
        kv_cache=arguments.kv_cache,
        local_share=arguments.local_share,
        repeats=arguments.repeats,
        baseline_repeats=arguments.baseline_repeats,
        has_parts=arguments.parts,
        max_new_tokens=arguments.max_new_tokens,
        joules=open_counter(os.environ.get("CUDA_VISIBLE_DEVICES")).read,
    )
    failed = False
    for length in bench.plan(arguments.lengths):
        if bench.is_measured(length, there):
            continue
        for one in bench.measure(length):
            if isinstance(one, Exception):
                failed = True
                print(f"minference-jax: error: {one}", file=sys.stderr, flush=True)
                continue
            print(json.dumps(one), flush=True)
            if output is not None:
                append(output, one)
    if failed:
        raise SystemExit(1)


def _of_shape(arguments: argparse.Namespace) -> Subject:
    """A model with random weights, and patterns as its name and config choose them."""
    check_pattern_option(arguments)
    fields = SHAPES[arguments.shape]
    config = read_config(fields)
    whole, layers = config.num_layers, _layers(arguments, config.num_layers)
    _check_lengths(arguments, config.max_length)
    patterns = uniform_patterns(whole, config.num_heads)
    label = patterns.source
    if arguments.pattern is not None:
        resolved = resolve_patterns(arguments.pattern, fields["_name_or_path"], fields)
        patterns, label = resolved.patterns, PurePath(resolved.place).name
        patterns.check(whole, config.num_heads)
    model = random_model(
        replace(config, num_layers=layers),
        dtype=arguments.dtype or _DTYPE,
        patterns=first_patterns(patterns, layers),
        tiles=choose_tiles(arguments.tiles),
        linear=arguments.linear,
    )
    return Subject(arguments.shape, model, whole, "activations of random weights", label)


def _of_model(arguments: argparse.Namespace) -> Subject:
    """A model as it is, or its first layers."""
    model = load_model(arguments)
    whole, layers = model.config.num_layers, _layers(arguments, model.config.num_layers)
    _check_lengths(arguments, model.config.max_length)
    source, file, _ = model.patterns.source.partition(".json")
    label = PurePath(source).name + file
    if layers < whole:
        model = first_layers(model, layers)
    return Subject(PurePath(arguments.model).name, model, whole, "activations of a random prompt", label)


def _layers(arguments: argparse.Namespace, whole: int) -> int:
    if arguments.layers is not None and arguments.layers > whole:
        raise ValueError(f"--layers {arguments.layers} is more than the {whole} layers of the model")
    return arguments.layers or whole


def _check_lengths(arguments: argparse.Namespace, most: int) -> None:
    """Refuses, with ValueError, lengths that the model can't read, before its weights are made."""
    if arguments.lengths is not None and max(arguments.lengths) > most:
        raise ValueError(f"--lengths {max(arguments.lengths)} is more than the {most} tokens that the model reads")

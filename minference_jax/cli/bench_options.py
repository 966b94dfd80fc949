"""Options of `minference-jax bench`. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from typing import Any

from minference_jax.bench.shapes import SHAPES
from minference_jax.cli.parser import Parser, add_attention, add_dtype, add_kv_cache, add_progress
from minference_jax.cli.values import four_sizes, not_negative, positive, share

SPARSE_NAMES = ("minference", "auto", "a_shape", "vertical_slash", "block_sparse")


def add_bench(commands: Any) -> None:
    """Adds `bench` with its suites."""
    does = "measure this machine"
    parser = commands.add_parser("bench", help=does, description=f"{does.capitalize()}.")
    suites = parser.add_subparsers(metavar="SUITE", required=True)
    _add_attention(suites)
    _add_prefill(suites)


def _add_attention(suites: Any) -> None:
    parser = suites.add_parser(
        "attention",
        help="one layer at several lengths",
        description="Check against the oracle, then time sparse against dense attention of one layer.",
    )
    parser.set_defaults(module="bench_command")
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="those so named, or with this in their names (all)")
    parser.add_argument("--lengths", type=positive, nargs="+", metavar="N", help="tokens (those of each case)")
    parser.add_argument("--implementation", metavar="NAME", help="mosaic_gpu, triton or xla (the first that can)")
    parser.add_argument(
        "--tiles",
        type=four_sizes,
        metavar="BLOCK_Q,BLOCK_KV,WARPS,STAGES",
        help="tile sizes in tokens, warps of a GPU program, stages of its pipeline; without it those that suit",
    )
    parser.add_argument(
        "--activations", metavar="FILE", help="q, k and v of one layer (.npz), whose estimated lists are then read"
    )
    parser.add_argument(
        "--skip-threshold",
        type=share,
        metavar="X",
        help="time the kernel with this skip_threshold, too, and measure its error (off)",
    )
    parser.add_argument(
        "--repeats", type=positive, metavar="N", help="timed runs, after one that warms (3; on a GPU 8 below 256K)"
    )
    parser.add_argument(
        "--baseline-repeats", type=positive, metavar="N", help="of dense attention (as --repeats; on a GPU 1 at 1M)"
    )
    _add_output(parser)


def _add_prefill(suites: Any) -> None:
    parser = suites.add_parser(
        "prefill",
        help="a whole model at several lengths, with a random prompt",
        description="Time prefills of a whole model, dense against sparse in turn, and their parts.",
    )
    parser.set_defaults(module="bench_prefill_command", compilation_cache=None)  # compilation is measured, too
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=SHAPES, help="a model of this shape with random weights, made on the device")
    which.add_argument("--model", metavar="MODEL", help="a model with its own weights: what load takes")
    add_dtype(parser, help="of weights, activations, cache (bfloat16; MODEL: as stored)")
    parser.add_argument(
        "--layers",
        type=positive,
        metavar="N",
        help="keep the first N layers only; records then say what all would take, and that it is extrapolated (all)",
    )
    parser.add_argument(
        "--lengths", type=positive, nargs="+", metavar="N", help="tokens (8192 32768 131072, as far as the model reads)"
    )
    parser.add_argument("--chunk-size", type=positive, metavar="N", help="tokens read at a time, multiple of 128 (all)")
    add_kv_cache(parser)
    parser.add_argument(
        "--local-share",
        type=share,
        metavar="X",
        help="construct the lists, this share of each head's slashes the nearest, the rest at random: random weights "
        "have no structure of their own (lists are estimated; the estimate runs in any case)",
    )
    _add_prefill_runs(parser)
    _add_output(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out lengths that --output has already, of this commit, device and settings",
    )
    add_progress(parser)
    add_attention(parser, SPARSE_NAMES)


def _add_prefill_runs(parser: Parser) -> None:
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="timed runs, after one that warms (3)")
    parser.add_argument(
        "--baseline-repeats", type=not_negative, metavar="N", help="of dense attention, 0 = none (as --repeats)"
    )
    parser.add_argument(
        "--parts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the parts of attention and a prefill without it, too (yes)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=not_negative,
        default=0,
        metavar="N",
        help="time the tokens of an answer of so many after a prefill, too (0)",
    )


def _add_output(parser: Parser) -> None:
    parser.add_argument("--output", metavar="FILE", help="append the records to this file of JSON lines")

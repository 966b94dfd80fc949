"""Options of `minference-jax bench`. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from minference_jax.cli.parser import Parser
from minference_jax.cli.values import four_sizes, positive


def add_bench(commands: Any) -> None:
    """Adds `bench` with its suites."""
    does = "measure this machine"
    parser = commands.add_parser("bench", help=does, description=f"{does.capitalize()}.")
    suites = parser.add_subparsers(metavar="SUITE", required=True)
    _add_attention(suites)


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
        "--repeats", type=positive, metavar="N", help="timed runs, after one that warms (3; on a GPU 8 below 256K)"
    )
    parser.add_argument(
        "--baseline-repeats", type=positive, metavar="N", help="of dense attention (as --repeats; on a GPU 1 at 1M)"
    )
    _add_output(parser)


def _add_output(parser: Parser) -> None:
    parser.add_argument("--output", metavar="FILE", help="append the records to this file of JSON lines")

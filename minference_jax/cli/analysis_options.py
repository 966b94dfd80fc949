"""Options of `minference-jax search` and `inspect`. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from typing import Any

from minference_jax.cli.parser import add_attention, add_model, add_prompt
from minference_jax.cli.values import HEAD_PATTERNS, factor, head_pattern, layer_and_head, positive, share


def add_search(commands: Any) -> None:
    """Adds `search` to the subcommands."""
    parser = commands.add_parser(
        "search",
        help="find the pattern of every head of a model",
        description="Find the pattern of every head: candidates with which the attention output is nearest to dense "
        "on calibration prompts, at a mean cost within the budget. Interrupted, "
        "the same command goes on at the last finished layer.",
    )
    parser.set_defaults(module="search_command", pattern=None, attention="minference", max_new_tokens=0)
    parser.add_argument("output", metavar="OUTPUT", help="the new pattern file; OUTPUT.journal keeps what was compared")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="where OUTPUT exists, search anew and replace it and its journal once the new answer is there",
    )
    parser.add_argument("--published", metavar="FILE", help="write the result in the published format, too")
    add_model(parser)
    _add_calibration(parser)
    _add_candidates(parser)


def _add_candidates(parser: Any) -> None:
    group = parser.add_argument_group("candidates")
    group.add_argument(
        "--budget",
        type=share,
        default=0.3,
        metavar="X",
        help="what heads may cost in the mean, as a share of dense (0.3)",
    )
    group.add_argument(
        "--levels",
        nargs="+",
        type=factor,
        metavar="X",
        help="budgets that a head may get, as multiples: heads that need more get more, and the mean over all heads "
        "keeps the budget; with 1 all heads cost the same, in a third of the time (0.5 1 2)",
    )
    group.add_argument(
        "--dense-heads",
        action=argparse.BooleanOptionalAction,
        help="heads that need it may stay dense (with several levels they may)",
    )
    group.add_argument(
        "--cost",
        choices=("tiles", "time"),
        default="tiles",
        help="tiles: work of the computed tiles; time: measured on this device (tiles)",
    )
    group.add_argument(
        "--candidates",
        nargs="+",
        type=head_pattern,
        metavar="KIND:SIZE[,SIZE]",
        help="kinds and proportions of sizes, such as vertical_slash:500,1500 a_shape:1024,4096 block_sparse:100; "
        "without it those of the paper and the default pattern",
    )
    group.add_argument(
        "--slash-granularity",
        choices=("line", "block"),
        help="with which the patterns are to run (line)",
    )
    group.add_argument("--implementation", metavar="NAME", help="of the attention; without it the first that can")
    group.add_argument("--tiles", metavar="FILE", help="measured tile sizes, from autotune; without it this user's own")


def _add_calibration(parser: Any) -> None:
    prompts = parser.add_argument_group("calibration prompts")
    prompts.add_argument("--prompt-file", nargs="+", metavar="FILE", help="files that hold one each (UTF-8)")
    prompts.add_argument("--question", metavar="TEXT", help="put after each file, as a question about the text above")
    prompts.add_argument("--max-prompt-tokens", type=positive, metavar="N", help="keep each file's first N tokens only")
    prompts.add_argument("--no-chat-template", action="store_true", help="plain text, whatever the model has")
    prompts.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help="tokens of generated prompts, key-value retrieval and parts of Python's manual in turn, where no file is "
        "given (30000, or what the model can read)",
    )
    prompts.add_argument("--num-prompts", type=positive, metavar="N", help="how many are generated (2)")
    prompts.add_argument("--seed", type=int, metavar="N", help="of the generated prompts (0)")


def add_inspect(commands: Any) -> None:
    """Adds `inspect` to the subcommands."""
    parser = commands.add_parser(
        "inspect",
        help="show what each head keeps and leaves out on a prompt",
        description="Compare each head with dense attention on one prompt: attention mass kept, output error, density "
        "of the computed tiles, expected time, and the passages that are left out.",
    )
    parser.set_defaults(module="inspect_command", max_new_tokens=0)
    add_model(parser)
    add_prompt(parser)
    add_attention(parser, choices=("minference", *HEAD_PATTERNS))
    group = parser.add_argument_group("what is shown")
    group.add_argument("--heads", action="store_true", help="a line for every head, not for every layer only")
    group.add_argument(
        "--of",
        type=layer_and_head,
        metavar="LAYER[,HEAD]",
        help="passages that this layer or head leaves out; without it those that the whole model does",
    )
    group.add_argument("--passages", type=positive, default=10, metavar="N", help="passages to list (10)")
    group.add_argument("--passage-size", type=positive, default=64, metavar="N", help="tokens of a passage (64)")
    group.add_argument("--no-time", action="store_true", help="measure no time")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    group.add_argument(
        "--heat-maps", metavar="FILE", help="write a picture of all heads (.png, .svg or .pdf; needs matplotlib)"
    )
    group.add_argument(
        "--head-map",
        nargs=2,
        action="append",
        default=[],
        metavar=("LAYER,HEAD", "FILE"),
        help="write a picture (.png, .svg or .pdf) of this head's attention with what is kept over it; repeatable",
    )

"""Options of `minference-jax demo`. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from minference_jax.cli.parser import (
    ATTENTION_NAMES,
    MODEL_HELP,
    add_attention,
    add_compilation_cache,
    add_dtype,
    add_progress,
)
from minference_jax.cli.values import not_negative, port, positive

_ATTENTIONS = tuple(name for name in ATTENTION_NAMES if name != "dense")


def add_demo(commands: Any) -> None:
    """Adds `demo` to the subcommands."""
    parser = commands.add_parser(
        "demo",
        help="a page in the browser: dense and sparse prefill of one text, side by side",
        description="Serve a page on which anyone pastes a long text and compares dense with sparse prefill. Texts "
        "are not written to disk; one run at a time; only this machine can reach it unless --host says otherwise. "
        "Needs the extra demo.",
    )
    parser.set_defaults(module="demo_command")
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODEL",
        help=f"{MODEL_HELP}; of several visitors choose one",
    )
    add_dtype(parser)
    add_compilation_cache(parser)
    add_progress(parser)
    add_attention(parser, choices=_ATTENTIONS, default="what pays at the length of the example")
    parser.set_defaults(attention=None)
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-prompt-tokens",
        type=positive,
        metavar="N",
        help="longer texts are refused (8192, or twice the length "
        "from which sparse attention pays on this device; at most the model's room)",
    )
    group.add_argument("--max-new-tokens", type=positive, default=48, metavar="N", help="of each answer (48)")
    group.add_argument("--repeats", type=positive, default=1, metavar="N", help="timed runs, after one that warms (1)")
    group.add_argument("--max-queue", type=not_negative, default=8, metavar="N", help="runs that may wait (8)")
    group = parser.add_argument_group("page")
    group.add_argument("--example-tokens", type=positive, metavar="N", help="of the first example (half of the most)")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (127.0.0.1: this machine)")
    group.add_argument("--port", type=port, metavar="N", help="to listen on (the first free one from 7860 on)")

"""Options of `minference-jax evaluate`. Nothing heavy is imported here, so that --help is instant."""

from __future__ import annotations

from typing import Any

from minference_jax.cli.parser import add_model
from minference_jax.cli.values import positive

_ATTENTION_HELP = (
    "beside dense: minference (the model's own patterns), a pattern file, a folder of the published files or a "
    "MInference release (the one for the model), a_shape (as many tiles as the first other one), a_shape:SINK,WINDOW, "
    "vertical_slash:VERTICALS,SLASHES, block_sparse:BLOCKS; NAME= calls it so, where NAME has no slash: write a path "
    "with = in it as ./PATH (minference a_shape)"
)


def add_evaluate(commands: Any) -> None:
    """Adds `evaluate`, with its benchmarks, to the subcommands."""
    parser = commands.add_parser(
        "evaluate",
        help="compare answers and perplexity with those of dense attention",
        description="Score dense attention and others on one model: accuracy with intervals, density beside it.",
    )
    suites = parser.add_subparsers(dest="suite", metavar="BENCHMARK", required=True)
    niah = _add_suite(suites, "niah", "a number hidden in prose, found or not, by depth and length")
    niah.add_argument("--text", metavar="FILE", required=True, help="prose (UTF-8) that haystacks are made of")
    niah.add_argument("--depths", type=positive, default=10, metavar="N", help="places of the needle (10)")
    niah.add_argument("--template", metavar="FILE", help="a message with {context} and {question} (MInference's own)")
    _add_samples(niah, 1, "prompts for each length and depth")
    ruler = _add_suite(suites, "ruler", "RULER's tasks: retrieval, tracing, counting, questions")
    ruler.add_argument("--tasks", nargs="+", metavar="NAME", help="RULER's names (the six that need no file)")
    ruler.add_argument("--text", metavar="FILE", help="prose (UTF-8) for the five tasks whose haystack is prose")
    ruler.add_argument("--squad", metavar="FILE", help="SQuAD 2.0 (JSON), for qa_1")
    ruler.add_argument("--hotpotqa", metavar="FILE", help="HotpotQA, distractor setting (JSON), for qa_2")
    _add_samples(ruler, 20, "for each task and length; the benchmark has 500")
    infinite = _add_suite(suites, "infinitebench", "InfiniteBench's tasks, made anew or from its files")
    infinite.add_argument("--tasks", nargs="+", metavar="NAME", help="InfiniteBench's names (the six synthetic ones)")
    infinite.add_argument("--data", metavar="FOLDER", help="read NAME.jsonl from here instead of making samples anew")
    infinite.add_argument(
        "--truncate-middle", action="store_true", help="take tokens out of the middle of prompts that are too long"
    )
    infinite.add_argument(
        "--questions", type=positive, default=1, metavar="N", help="about each context of kv_retrieval (1)"
    )
    infinite.add_argument(
        "--whole-prompts",
        action="store_true",
        help="read every prompt whole, as the paper does, also where several questions share a context",
    )
    _add_samples(infinite, 20, "for each task and length")
    text = _add_suite(suites, "perplexity", "how well a text is predicted, by position")
    text.add_argument("--text", metavar="FILE", required=True, help="prose (UTF-8), the length times the samples long")
    text.add_argument("--steps", type=positive, default=8, metavar="N", help="ranges of positions (8)")
    _add_samples(text, 1, "excerpts for each length")
    _add_linear(suites)


def _add_linear(suites: Any) -> None:
    does = "what 8-bit linear layers cost: the error of each product, of the logits, and perplexity"
    parser = suites.add_parser("linear", help=does, description=f"{does[0].upper()}{does[1:]}; with dense attention.")
    unused = {"pattern": None, "attention": "minference", "tiles": None}
    parser.set_defaults(module="evaluate_linear_command", **unused)
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", required=True, help="prose (UTF-8), whose first tokens are read")
    parser.add_argument("--length", type=positive, default=2048, metavar="N", help="tokens, at most 16384 (2048)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_suite(suites: Any, name: str, does: str) -> Any:
    """A benchmark with what all have."""
    parser = suites.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}; dense against others.")
    parser.set_defaults(module="evaluate_command", pattern=None, attention="minference")
    add_model(parser)
    parser.add_argument(
        "--tiles", metavar="FILE", help="measured tile sizes, from autotune; without it this user's own"
    )
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[4096], metavar="N", help="tokens of prompt and answer (4096)"
    )
    parser.add_argument("--attentions", nargs="+", metavar="[NAME=]WHAT", help=_ATTENTION_HELP)
    parser.add_argument("--slash-granularity", choices=("line", "block"), help="as in prefill (line)")
    parser.add_argument("--implementation", metavar="NAME", help="of the attention; without it the first that can")
    if name != "perplexity":
        parser.add_argument("--seed", type=int, metavar="N", help="of all that is drawn (42)")
        parser.add_argument("--no-chat-template", action="store_true", help="plain text, whatever the model has")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="X", help="of the intervals (0.95)")
    parser.add_argument("--output", metavar="FILE", help="JSON lines of every sample; one that exists is gone on with")
    parser.add_argument("--summary", metavar="FILE", help="append the table's rows to this file of JSON lines")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture (png, svg or pdf); needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print the table's rows as JSON lines")
    return parser


def _add_samples(parser: Any, default: int, what: str) -> None:
    parser.add_argument("--samples", type=positive, default=default, metavar="N", help=f"{what} ({default})")

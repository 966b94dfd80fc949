"""`minference-jax prefill`: one prompt, dense against sparse, as a report or as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import textwrap
from typing import Any

import jax

import minference_jax
from minference_jax.cache import policy_of
from minference_jax.cli.inputs import (
    check_granularity,
    choose_attention,
    encode_prompt,
    load_model,
    model_name,
    read_prompt,
)
from minference_jax.cli.progress import Steps, wants_bars
from minference_jax.generate import LanguageModel
from minference_jax.generate.chunks import check_chunks
from minference_jax.measure import ChosenAttention, Comparison, Prompt, Step, compare, device_name, steps_of
from minference_jax.models import linear_of


def run(arguments: argparse.Namespace) -> None:
    """Compares and prints."""
    check_chunks(arguments.chunk_size, policy_of(arguments.kv_cache))
    attention, text = choose_attention(arguments), read_prompt(arguments)
    model = load_model(arguments)
    check_granularity(model, attention)
    prompt = encode_prompt(model, text, arguments)
    with Steps(steps_of(arguments.repeats), wants_bars(arguments.progress)) as steps:
        comparison = compare(
            model,
            prompt.tokens,
            attention=attention,
            implementation=arguments.implementation,
            max_new_tokens=arguments.max_new_tokens,
            repeats=arguments.repeats,
            chunk_size=arguments.chunk_size,
            kv_cache=arguments.kv_cache,
            step=lambda step: steps.step(_title(step, attention.name, arguments.repeats)),
        )
    facts = record(model_name(arguments), model, prompt, attention, comparison)
    facts |= {"chunk_size": arguments.chunk_size, "kv_cache": arguments.kv_cache}
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else report(facts))


def _title(step: Step, attention: str, repeats: int) -> str:
    name = "dense" if step.side == "dense" else "dense again" if attention == "dense" else attention
    return f"{step.kind} {name}" + (f", run {step.run} of {repeats}" if step.kind == "prefill" else "")


def record(
    name: str, model: LanguageModel, prompt: Prompt, attention: ChosenAttention, comparison: Comparison
) -> dict[str, Any]:
    """All that is known of a comparison, as one JSON object; times in seconds, null where a thing was not measured."""
    dense, sparse, density = comparison.dense, comparison.sparse, comparison.density
    by_head = {"density": 1.0, "density_min": 1.0, "density_max": 1.0, "heads": None}
    if density is not None:
        by_head = {"density": float(density.mean()), "density_min": float(density.min())}
        by_head |= {"density_max": float(density.max()), "heads": density.size}
    return {
        "model": name,
        "dtype": str(model.model.dtype),
        "linear": linear_of(model.model),
        "tokens": len(prompt.tokens),
        "chat_template": prompt.is_chat,
        "attention": attention.name,
        "ran": "dense" if density is None else "sparse",
        "pattern": model.patterns.described_for(name)
        if attention.name in ("minference", "auto")
        else attention.description,
        "slash_granularity": attention.slash_granularity,
        "implementation": sparse.implementation,
        **by_head,
        "dense_compile_seconds": dense.compile_seconds,
        "sparse_compile_seconds": sparse.compile_seconds,
        "dense_seconds": dense.median_seconds,
        "sparse_seconds": sparse.median_seconds,
        "dense_runs": list(dense.seconds),
        "sparse_runs": list(sparse.seconds),
        "speedup": comparison.speedup,
        "greedy_agreement": comparison.agreed / comparison.compared,
        "greedy_tokens": comparison.compared,
        "max_logit_difference": comparison.max_logit_difference,
        "peak_bytes": comparison.peak_bytes,
        "peak_of": comparison.peak_of,
        "text": sparse.text,
        "dense_text": dense.text,
        "device": device_name(),
        "versions": {
            "minference_jax": minference_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }


def report(facts: dict[str, Any]) -> str:
    """The record as a page to read."""
    attention, compared = facts["attention"], facts["greedy_tokens"]
    agreed = round(facts["greedy_agreement"] * compared)
    density = f"{facts['density']:.3f} of dense attention's work"
    if facts["heads"] is not None:
        density += f"; heads from {facts['density_min']:.3f} to {facts['density_max']:.3f}"
    peak = "unknown" if facts["peak_bytes"] is None else f"{facts['peak_bytes'] / 1e9:.2f} GB ({facts['peak_of']})"
    runs = len(facts["dense_runs"])
    linear = "" if facts["linear"] is None else f", linear layers of {facts['linear']}"
    chunks = "" if facts["chunk_size"] is None else f", {facts['chunk_size']} at a time"
    lines = [
        f"model        {facts['model']}, {facts['dtype']}{linear}",
        f"device       {facts['device']}; jax {facts['versions']['jax']}",
        f"prompt       {facts['tokens']} tokens, {'in the chat template' if facts['chat_template'] else 'plain text'}"
        f"{chunks}",
        f"attention    {attention}, implementation {facts['implementation']}",
        f"pattern      {facts['pattern']}",
        f"density      {density}",
        f"KV cache     {facts['kv_cache']}",
        "",
        f"{'':12} {'dense':>14} {attention:>14}",
        f"compile      {_seconds(facts['dense_compile_seconds'])} {_seconds(facts['sparse_compile_seconds'])}",
        f"prefill      {_seconds(facts['dense_seconds'])} {_seconds(facts['sparse_seconds'])}"
        f"   {facts['speedup']:.2f} times as fast ({'one run' if runs == 1 else f'median of {runs} runs'} each)",
        "",
        f"agreement    {agreed} of {compared} greedy tokens; logits differ by at most "
        f"{facts['max_logit_difference']:.3g}",
        f"peak memory  {peak}",
        "",
    ]
    for name, text in (("dense", facts["dense_text"]), (attention, facts["text"])):
        lines += [f"{name} answers:", textwrap.indent(text.strip() or "(nothing)", "    "), ""]
    return "\n".join(lines).rstrip()


def _seconds(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f} s':>14}"

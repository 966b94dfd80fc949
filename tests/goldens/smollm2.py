"""The comparison on real weights: SmolLM2-135M-Instruct reads a thousand tokens of a novel and is asked about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "smollm2.json"
NEW_TOKENS = 64
TOP = 200
SAMPLED = 300


def question() -> str:
    """The user's message: the opening of Persuasion, then a question that it answers."""
    novel = (Path(__file__).parents[2] / "examples" / "persuasion.txt").read_text("utf-8")
    opening = novel[novel.index("Chapter 1") : novel.index("Chapter 1") + 4300]
    return f"{opening}\n\nWhich book does Sir Walter Elliot read for his own amusement? Answer in one sentence."


def golden_of(prompt: list[int], logits: np.ndarray, tokens: list[int]) -> dict[str, list]:
    """What is committed: of the last logits [V] the largest and a fixed sample, as [id, value] pairs."""
    top = np.argsort(-logits, kind="stable")[:TOP]
    sample = np.random.default_rng(0).choice(len(logits), SAMPLED, replace=False)
    chosen = {"top": top, "sample": np.sort(sample)}
    pairs = {name: [[int(i), float(f"{logits[i]:.7g}")] for i in ids] for name, ids in chosen.items()}
    return {"prompt": prompt, "tokens": tokens, **pairs}


def read_golden() -> dict[str, list]:
    """As `golden_of` gives it."""
    return json.loads(GOLDEN.read_text())

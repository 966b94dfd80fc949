"""The text of an uploaded file, or one sentence that says why there is none. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

from minference_jax.demo.settings import MAX_PAGES, MAX_UPLOAD_BYTES, Refused

SUFFIXES = (".txt", ".md", ".pdf")
_PDF_SECONDS = 30
_PDF_SAYS = {
    "encrypted": "The PDF file is encrypted: remove its password first.",
    "pages": f"The PDF file has more than {MAX_PAGES} pages.",
    "damaged": "The PDF file is damaged and can't be read.",
    "long": "The PDF file has more text than this demo reads.",
}
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
_CONTROL_SHARE = 0.01  # of a text's characters; more than stray form feeds, and it is no text


def read_upload(raw: bytes, name: str, *, max_characters: int) -> str:
    """The text of an upload; what it is is told by its content, and must agree with its name's ending.

    Args:
        raw: content.
        name: as the visitor's file is called; only its ending counts.
        max_characters: most characters of text.

    Raises:
        Refused: too many bytes, pages or characters, no text, another kind of file, an encrypted or damaged PDF.
    """
    if len(raw) > MAX_UPLOAD_BYTES:
        raise Refused(f"The file has {len(raw):,} bytes, and this demo takes at most {MAX_UPLOAD_BYTES:,}.")
    suffix = Path(name.replace("\\", "/")).suffix.lower()
    if suffix not in SUFFIXES:
        raise Refused(f"The file's name must end in one of {', '.join(SUFFIXES)}.")
    is_pdf = b"%PDF-" in raw[:1024] if suffix == ".pdf" else raw.lstrip().startswith(b"%PDF-")
    if is_pdf != (suffix == ".pdf"):
        raise Refused(f"The content of the file is not what its name, ending in {suffix}, says.")
    text = _pdf(raw, max_characters) if is_pdf else _plain(raw, max_characters)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise Refused("The file has no text" + (": is the PDF a scan?" if is_pdf else "."))
    return text


def _plain(raw: bytes, max_characters: int) -> str:
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        raise Refused("The file is not text in UTF-8 or UTF-16.") from None
    if "\0" in text:
        raise Refused("The file is binary, not text.")
    if len(text) > max_characters:
        raise Refused(f"The file has {len(text):,} characters, and this demo takes at most {max_characters:,}.")
    odd = sum(unicodedata.category(sign) == "Cc" and sign not in "\t\n\r\f" for sign in text)
    if odd > _CONTROL_SHARE * len(text):
        raise Refused("The file is binary, not text.")
    return text


def _pdf(raw: bytes, max_characters: int) -> str:
    """Reads the file in a process of its own, with bounds on time and memory, so that a trap in it harms nobody."""
    command = [sys.executable, "-P", "-m", "minference_jax.demo.pdf_text", str(MAX_PAGES), str(max_characters)]
    try:
        done = subprocess.run(command, input=raw, capture_output=True, timeout=_PDF_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"The PDF file takes more than {_PDF_SECONDS} seconds to read.") from None
    if done.returncode != 0:
        raise Refused("The PDF file takes more memory or time to read than this demo gives.")
    found = json.loads(done.stdout)
    if "refused" in found:
        raise Refused(_PDF_SAYS[found["refused"]])
    return found["text"]

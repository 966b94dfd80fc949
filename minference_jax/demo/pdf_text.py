"""A process that reads a PDF file from standard input and prints its text, or why not, as JSON.

`python -P -m minference_jax.demo.pdf_text MAX_PAGES MAX_CHARACTERS`
"""

from __future__ import annotations

import io
import json
import logging
import struct
import sys
import zlib

_MEMORY_BYTES = 2**30  # of address space
_CPU_SECONDS = 25
_ODD: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, OSError),
    *(RecursionError, TypeError, ValueError, struct.error, zlib.error),
)
"""What pypdf raises on damaged files beside its own errors."""


def main() -> None:
    """Prints {"text": ...} or {"refused": "encrypted", "pages", "damaged" or "long"}; dies where bounds are passed."""
    _bound()
    logging.disable()  # pypdf tells of each damaged object
    max_pages, max_characters = map(int, sys.argv[1:])
    print(json.dumps(read(sys.stdin.buffer.read(), max_pages, max_characters)))


def _bound() -> None:
    try:
        import resource
    except ImportError:  # Windows has none: the caller's clock is what bounds the process there
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # writes no file


def read(raw: bytes, max_pages: int, max_characters: int) -> dict[str, str]:
    """The text of a PDF file, or why there is none.

    Args:
        raw: content.
        max_pages, max_characters: more are refused.
    """
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, LimitReachedError, PyPdfError

    parts: list[str] = []
    try:
        reader = PdfReader(io.BytesIO(raw))
        if reader.is_encrypted and not reader.decrypt(""):  # many have an empty password, and everyone may read them
            return {"refused": "encrypted"}
        if len(reader.pages) > max_pages:
            return {"refused": "pages"}
        for page in reader.pages:
            parts.append(page.extract_text())
            if sum(map(len, parts)) > max_characters:
                return {"refused": "long"}
    except LimitReachedError:
        return {"refused": "long"}
    except DependencyError:  # an encryption for which pypdf needs another package
        return {"refused": "encrypted"}
    except (PyPdfError, *_ODD):
        return {"refused": "damaged"}
    return {"text": "\n\n".join(parts).encode("utf-8", "replace").decode()}


if __name__ == "__main__":
    main()

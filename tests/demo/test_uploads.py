"""Uploads: 60 odd files, each is read or refused in one sentence."""

import io
import os
import subprocess
import sys

import odd_demo_files as odd
import pytest

from minference_jax.demo import uploads
from minference_jax.demo.pdf_text import read
from minference_jax.demo.settings import MAX_PAGES, Refused

MOST = 100_000  # characters
by_name = {"ids": lambda value: value[:30] if isinstance(value, str) else ""}


def check(name, raw, word):
    """Whether a file is read, where there is no word, or refused in one sentence that has it."""
    try:
        text = uploads.read_upload(raw, name, max_characters=MOST)
    except Refused as error:
        said = str(error)
        assert word, f"{name}: {said}"
        assert word in said
        assert "\n" not in said
        assert said[-1] in ".?"
    else:
        assert not word, f"{name} was read: {text[:50]!r}"
        assert text.strip()
        assert "\r" not in text
        assert "\0" not in text


def test_there_are_fifty_odd_files():
    assert len(odd.PLAIN) + len(odd.PDF) >= 50


@pytest.mark.parametrize(("name", "raw", "word"), odd.PLAIN, **by_name)
def test_plain_files_are_read_or_refused_in_one_sentence(name, raw, word):
    check(name, raw, word)


@pytest.mark.parametrize(("name", "raw", "word"), odd.PDF, **by_name)
def test_pdf_files_are_read_or_refused_in_one_sentence(name, raw, word, monkeypatch):
    pytest.importorskip("pypdf", reason="PDF files need the extra demo")

    def here(raw, most):  # what the process of its own does, without the second that starting one takes
        found = read(raw, MAX_PAGES, most)
        if "refused" in found:
            raise Refused(uploads._PDF_SAYS[found["refused"]])
        return found["text"]

    monkeypatch.setattr(uploads, "_pdf", here)
    check(name, raw, word)


def test_encrypted_pdf_is_refused(monkeypatch):
    pypdf = pytest.importorskip("pypdf", reason="PDF files need the extra demo")
    writer = pypdf.PdfWriter(io.BytesIO(odd.GOOD))
    writer.encrypt("secret", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    assert read(out.getvalue(), MAX_PAGES, MOST) == {"refused": "encrypted"}


def test_pdf_with_an_empty_password_is_read():
    pypdf = pytest.importorskip("pypdf", reason="PDF files need the extra demo")
    writer = pypdf.PdfWriter(io.BytesIO(odd.GOOD))
    writer.encrypt("", "owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    assert "Hello from a page" in read(out.getvalue(), MAX_PAGES, MOST)["text"]


TRAPS = {
    "": "",
    "memory": "bytearray(2**31)",
    "time": "[0 for _ in iter(int, 1)]",
    "file": "__import__('pathlib').Path('written').write_text('a')",
}


@pytest.mark.skipif(sys.platform != "linux", reason="bounds of a process are tested on Linux")
@pytest.mark.parametrize("trap", TRAPS)
def test_process_that_reads_pdf_files_is_bounded(tmp_path, trap):
    program = (
        "import sys\nfrom minference_jax.demo import pdf_text\npdf_text._CPU_SECONDS = 1\n"
        f"def read(*arguments):\n    {TRAPS[trap] or 'pass'}\n    return {{'text': 'Words.'}}\n"
        "pdf_text.read = read\npdf_text.main()"
    )
    command = [sys.executable, "-P", "-c", program, "1", "1"]
    done = subprocess.run(command, input=b"", cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert (done.returncode == 0) == (not trap)
    assert (b"Words." in done.stdout) == (not trap)


def test_text_of_a_pdf_comes_from_a_process_of_its_own():
    pytest.importorskip("pypdf", reason="PDF files need the extra demo")
    assert "Hello from a page" in uploads.read_upload(odd.GOOD, "a.pdf", max_characters=MOST)
    check("truncated.pdf", odd.GOOD[:200], "damaged")


@pytest.mark.skipif(sys.platform != "linux", reason="bounds of a process are tested on Linux")
def test_process_that_dies_or_takes_too_long_is_a_refusal(monkeypatch, tmp_path):
    program = tmp_path / "python"
    monkeypatch.setattr(uploads.sys, "executable", str(program))
    for script, word in (("exit 1", "memory or time"), ("exec sleep 30", "more than 0.2 seconds")):
        program.write_text(f"#!/bin/sh\n{script}\n")
        os.chmod(program, 0o700)
        monkeypatch.setattr(uploads, "_PDF_SECONDS", 30 if "exit" in script else 0.2)
        with pytest.raises(Refused, match=word):
            uploads.read_upload(odd.GOOD, "a.pdf", max_characters=MOST)

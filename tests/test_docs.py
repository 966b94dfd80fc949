"""What the documents say is so: their Python runs, their links lead somewhere, their options exist."""

import contextlib
import importlib
import inspect
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minference_jax

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part == "build" or part.startswith(".") for part in path.relative_to(ROOT).parts)
]
README = ROOT / "README.md"
BLOCK = re.compile(r"^(?P<marker><!--[^\n]*-->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def blocks(path, language):
    """Give (line, marker comment, code) of each fenced block of a language."""
    text = path.read_text()
    found = [match for match in BLOCK.finditer(text) if match["language"] == language]
    return [(text.count("\n", 0, match.start("code")) + 1, match["marker"] or "", match["code"]) for match in found]


def anchors(path):
    """Give the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*?) *$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_python(code, folder):
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # the checkout's kernels/ must not shadow an installed package
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def help_of(*arguments):
    """Give the --help text of the command line or of one of its subcommands."""
    cli = importlib.import_module("minference_jax.cli")
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    return printed.getvalue()


def commands():
    """Give every minference-jax command line of the README's shell blocks, its continuation lines joined."""
    lines = "".join(code for language in ("bash", "sh", "console") for _, _, code in blocks(README, language))
    whole = lines.replace("\\\n", " ").splitlines()
    return [
        match[1].split() for line in whole for match in [re.search(r"\bminference-jax((?: +[^#|;&]+)+)", line)] if match
    ]


def test_readme_has_python_and_the_command_that_passes_the_tests():
    assert blocks(README, "python")
    (command,) = [code for _, marker, code in blocks(README, "bash") if "test-command" in marker]
    assert "pytest" in command


def python_blocks():
    """Give each python block of the README; one marked <!-- needs: default model --> needs the package index."""
    for line, marker, code in blocks(README, "python") if README.exists() else []:
        marks = [pytest.mark.network] if "default model" in marker else []
        yield pytest.param("\n" * (line - 1) + code, id=f"line {line}", marks=marks)


@pytest.mark.parametrize("code", list(python_blocks()))
def test_readme_python_runs(code, tmp_path):
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_internal_link_leads_somewhere(path):
    for link in LINK.finditer(BLOCK.sub("", path.read_text())):
        target, _, anchor = link["target"].partition("#")
        if re.match(r"\w+:", link["target"]):
            continue  # another site
        there = path.parent / target if target else path
        assert there.exists(), f"{path.name}: {link['target']}"
        assert not anchor or there.suffix != ".md" or anchor in anchors(there), f"{path.name}: {link['target']}"


def test_every_command_and_option_in_the_readme_exists():
    top = help_of()
    assert commands()
    for command in commands():
        words = list(itertools.takewhile(re.compile(r"[a-z]+").fullmatch, command))  # a subcommand, perhaps of another
        assert not words or re.search(rf"\b{words[0]}\b", top), f"{words[0]} is not a subcommand"
        known = re.findall(r"--[a-z][a-z0-9-]*", help_of(*words))
        for option in (word.partition("=")[0] for word in command if word.startswith("--")):
            assert option in known, f"minference-jax {' '.join(words)} has no {option}"


@pytest.mark.parametrize("name", [name for name in minference_jax.__all__ if not name.startswith("__")])
def test_every_public_name_says_what_it_needs(name):
    value = getattr(minference_jax, name)
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return  # a constant or a type alias: its documentation is a string in the source
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    assert text.splitlines()[0].endswith((".", ":")), f"{name}: the first line is a sentence"
    if inspect.isfunction(value):
        assert "Raises" in text, f"{name}: a caller must know what is refused"
        for parameter in inspect.signature(value).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter} is not described"
        if {"q", "k", "v"} <= inspect.signature(value).parameters.keys():
            assert re.search(r"\[B, ?[TS], ?[NK], ?H\]", text), f"{name}: the arrays' shapes are not described"

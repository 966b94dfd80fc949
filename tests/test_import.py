"""Importing does no work, and the public names are where they are said to be."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typed_usage

import minference_jax

ROOT = Path(__file__).parent.parent
FOLDERS = {"minference_jax": "minference_jax", "kernels": "minference_jax.kernels", "convert": "minference_jax.convert"}
MODULES = sorted(
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__")
    for folder, package in FOLDERS.items()
    for path in (ROOT / folder).rglob("*.py")
)


def run_python(code):
    """Run code in a Python of its own in which any use of the network is an error; give what it printed."""
    guard = """
import sys
def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise RuntimeError(f"network: {event} {args}")
sys.addaudithook(guard)
"""
    result = subprocess.run([sys.executable, "-P", "-c", guard + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


def test_import_touches_no_device():
    assert "minference_jax.kernels" in MODULES
    result = run_python(f"""
import importlib
for name in {MODULES}:
    importlib.import_module(name)
from jax._src import xla_bridge
if xla_bridge.backends_are_initialized():
    sys.exit("a device was initialised")
""")
    assert (result.stdout, result.stderr) == ("", "")


def test_importing_the_package_imports_nothing_else():
    result = run_python("""
before = set(sys.modules)
import minference_jax
import json
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
""")
    assert not {"jax", "numpy", "flax", "transformers"} & set(json.loads(result.stdout))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["prefill", "--help"], ["convert", "--help"], ["demo", "--help"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments):
    result = run_python(f"""
import minference_jax.cli
try:
    code = minference_jax.cli.main({arguments})
except SystemExit as stop:
    code = stop.code
heavy = {{"jax", "flax", "transformers", "orbax", "torch"}} & set(sys.modules)
if code or heavy:
    sys.exit(f"{{code=}} {{heavy=}}")
""")
    assert result.stdout
    assert not result.stderr


def test_every_public_name_is_found_and_listed():
    assert len(set(minference_jax.__all__)) == len(minference_jax.__all__)
    assert set(minference_jax.__all__) <= set(dir(minference_jax))
    for name in minference_jax.__all__:
        assert getattr(minference_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'minference_jax' has no attribute 'nothing'"):
        minference_jax.nothing  # noqa: B018


def test_version_is_that_of_the_installed_distribution():
    assert minference_jax.__version__ == importlib.metadata.version("minference-jax")


def test_type_checkers_see_the_same_names_as_the_lazy_import():
    tree = ast.parse((ROOT / "minference_jax/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {"__version__": None}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.name: node.module for alias in node.names}
    assert set(seen) == set(minference_jax.__all__)
    for name, module in seen.items():
        if module is not None:
            assert getattr(minference_jax, name) is getattr(importlib.import_module(module), name)


def test_a_typed_users_file_runs(tmp_path):
    patterns = typed_usage.patterns_of_a_model(tmp_path)
    assert typed_usage.attend(patterns) < 1

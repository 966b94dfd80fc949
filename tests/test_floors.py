"""The floors of the product: imports point down only, and only the top floor talks to the world."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"minference_jax": "minference_jax", "kernels": "minference_jax.kernels", "convert": "minference_jax.convert"}
FLOORS = {
    "cli": 6,
    "bench": 6,
    "evaluate": 6,
    "demo": 6,
    "loading": 5,
    "compilation": 5,
    "search": 5,
    "inspection": 5,
    "analysis": 5,
    "measure": 5,
    "plan": 5,
}
FLOORS |= {"generate": 4, "convert": 4, "models": 3}
FLOORS |= {
    "attention": 2,
    "capacities": 2,
    "implementations": 2,
    "index": 2,
    "estimate": 2,
    "patterns": 1,
    "cache": 1,
    "tile_table": 1,
    "journal": 1,
    "figures": 1,
    "kernels": 0,
    "short_repr": 0,
}
SIBLINGS = {
    ("cli", "bench"),
    ("search", "analysis"),
    ("inspection", "analysis"),
    ("plan", "measure"),
    ("cli", "evaluate"),
    ("cli", "demo"),
    ("demo", "evaluate"),
    ("evaluate", "bench"),
    ("attention", "capacities"),
    ("attention", "implementations"),
    ("attention", "index"),
    ("capacities", "estimate"),
    ("implementations", "estimate"),
    ("index", "estimate"),
}  # within one floor
TALK = {"os.environ", "os.environb", "os.getenv", "os.putenv", "sys.argv", "sys.stdin", "sys.stdout", "sys.stderr"}
BACKENDS = {"triton": "_triton.py", "mosaic_gpu": "_mosaic_gpu.py"}
FILES = {
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)): path
    for folder, package in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PRODUCT = pytest.mark.parametrize("name", FILES)
BELOW = pytest.mark.parametrize("name", [name for name in FILES if name != "minference_jax.__init__"])  # not the facade


def nodes(name, *types):
    return [node for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, types)]


def imported(name):
    """Give the full dotted name of everything that a file imports, wherever in the file."""
    whole = [alias.name for node in nodes(name, ast.Import) for alias in node.names]
    parts = [
        f"{'.' * node.level}{node.module}.{alias.name}" for node in nodes(name, ast.ImportFrom) for alias in node.names
    ]
    return whole + parts


def unit(name):
    return name.partition(".")[2].partition(".")[0]


def test_every_module_has_a_floor():
    assert {unit(name) for name in FILES} - {"__init__"} <= FLOORS.keys()
    assert {"minference_jax.kernels.__init__", "minference_jax.convert.__init__"} <= FILES.keys()


@BELOW
def test_imports_point_down(name):
    own = unit(name)
    for target in imported(name):
        assert not target.startswith("."), f"{target}: write the absolute name"
        if target.split(".")[0] == "minference_jax" and unit(target) != own:
            below = FLOORS.get(unit(target), 7) < FLOORS[own]  # a name of the facade counts as above everything
            facade = FLOORS[own] == 6 and unit(target) not in FLOORS
            assert below or facade or (own, unit(target)) in SIBLINGS, f"{own} must not import {target}"


@PRODUCT
def test_kernels_know_jax_alone_and_each_backend_has_its_files(name):
    for target in imported(name):
        if unit(name) == "kernels":
            assert target.split(".")[0] in {"jax", "minference_jax", *sys.stdlib_module_names}, target
        for backend, ending in BACKENDS.items():
            if target.startswith("jax.") and backend in target.split("."):
                assert FILES[name].name.endswith(ending), f"{target} belongs in *{ending}"
        if target.split(".")[0] == "platformdirs":
            asks = ("minference_jax.loading", "minference_jax.compilation")
            assert name in asks, "where a system keeps its caches is for these to ask"


@PRODUCT
def test_only_the_top_floor_prints_or_reads_the_environment(name):
    if FLOORS.get(unit(name)) == 6:
        return
    said = {ast.unparse(node) for node in nodes(name, ast.Attribute, ast.Name)} | set(imported(name))
    assert not said & {*TALK, "print", "input", "argparse"}


@PRODUCT
def test_files_and_functions_are_short(name):
    assert len(FILES[name].read_text().splitlines()) <= 400
    for node in nodes(name, ast.FunctionDef, ast.AsyncFunctionDef):
        documented = ast.get_docstring(node) is not None
        start = node.body[0].end_lineno if documented else node.lineno  # a docstring may be as long as it needs
        limit = 120 if unit(name) == "kernels" and node.name.endswith("_kernel") else 50
        assert node.end_lineno - start <= limit, f"{node.name} has {node.end_lineno - start} lines"


@PRODUCT
def test_mistakes_are_raised_and_never_swallowed(name):
    assert not nodes(name, ast.Assert), "assert vanishes under -O: raise ValueError"
    for handler in nodes(name, ast.ExceptHandler):
        assert handler.type is not None, f"line {handler.lineno}: a bare except takes everything for a known case"
        broad = ast.unparse(handler.type) in {"Exception", "BaseException"}
        raises = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
        assert raises or not broad, f"line {handler.lineno}: except {ast.unparse(handler.type)} hides faults"


@pytest.mark.parametrize("name", ["minference_jax.kernels.__init__", "minference_jax.convert.__init__"])
def test_folders_with_common_names_hold_a_docstring_only(name):
    (only,) = ast.parse(FILES[name].read_text()).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)

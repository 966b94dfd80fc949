"""What is read of Nsight Compute's page: the longest kernel's counters, in base units."""

import csv
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "profile_kernel.py"
SCRIPT = runpy.run_path(str(PATH))
COUNTERS = SCRIPT["COUNTERS"]


def page(*kernels):
    """As ncu writes it: what it did, names, units, a line for each kernel; commas part thousands."""
    file = io.StringIO()
    file.write("==PROF== Disconnected\n")
    rows = [[name, *(f"{value:,.1f}" for value in values)] for name, values in kernels]
    csv.writer(file).writerows([["Kernel Name", *COUNTERS.values()], [""] * (1 + len(COUNTERS)), *rows])
    return file.getvalue()


def test_the_longest_kernel_counts():
    values = [float(100 * n) for n in range(1, len(COUNTERS) + 1)]
    short, long = ([ns, *values[1:]] for ns in (900.0, 18_040_032.0))
    found = SCRIPT["counted"](page(("a_mosaic_copy", short), ("mosaic", long), ("mosaic_too", short)))
    assert found == {"kernel": "mosaic"} | dict(zip(COUNTERS, long, strict=True))


@pytest.mark.parametrize("written", ["", page()], ids=["nothing", "headings"])
def test_a_page_without_kernels_is_refused(written):
    with pytest.raises(RuntimeError, match="no kernel was profiled whose name matches regex:"):
        SCRIPT["counted"](written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["VS", "8192"], "'VS' must be the name of one case, and 'dense' with cudnn"),
        (["VS line", "8192", "--implementation", "cudnn"], "'VS line' must be the name of one case, and 'dense'"),
        (["no such", "8192"], "no case has 'no such' in its name"),
        (["dense", "0"], "length 0 must be at least 1"),
        (["dense", "8192", "--heads", "6"], "--heads 6 must be a positive multiple of 4"),
        (["dense", "8192", "--heads", "0"], "--heads 0 must be a positive multiple of 4"),
        (["dense", "8192"], "ncu, of Nsight Compute, is not on the PATH"),
        (["dense", "8192", "--inside", "unused"], "it needs an NVIDIA GPU, not "),
    ],
)
def test_what_cannot_be_profiled_is_said_in_one_sentence(arguments, message, tmp_path):
    settings = os.environ | {"PATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, PATH, *arguments], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]

"""What is read of Nsight Compute's page: the longest kernel's counters, in base units."""

import csv
import io
import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "profile_kernel.py"))
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


def test_a_page_without_kernels_is_refused():
    with pytest.raises(RuntimeError, match="no kernel was profiled whose name matches regex:"):
        SCRIPT["counted"](page())

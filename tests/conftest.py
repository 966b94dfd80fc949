"""What all tests share."""

from pathlib import Path

import hypothesis
import jax
import pytest
from oracle import oracle_implementation

from minference_jax import implementations

hypothesis.settings.register_profile("gate", deadline=None, derandomize=True)  # no test asserts a time
hypothesis.settings.load_profile("gate")

MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = (
    30_000  # Linux allows a process 65,530, each program that XLA compiles takes some, and beyond it crashes
)


def pytest_collection_modifyitems(items):
    """Skips what needs an NVIDIA GPU where there is none."""
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def _no_stored_tiles(tmp_path_factory):
    """Gives tests, and the processes that they start, a config folder of their own: a user's may hold tile sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile(request):
    """On a CPU programs of tests are compiled with few optimisations, but for those marked `optimized`.

    Most run once, on small arrays, and take longer to compile than to run.
    """
    if jax.default_backend() == "cpu":
        is_optimized = request.node.get_closest_marker("optimized") is not None
        jax.config.update("jax_disable_most_optimizations", not is_optimized)


@pytest.fixture(autouse=True)
def _forget_programs():
    """Drops compiled programs where a process has very many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def oracle_first():
    """The oracle is what runs where no implementation is named: for tests of what is built on attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementations, "IMPLEMENTATIONS", (oracle_implementation(), *implementations.IMPLEMENTATIONS))
        yield

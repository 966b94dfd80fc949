"""What all tests share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_stored_tiles(tmp_path_factory):
    """Gives tests, and the processes that they start, a config folder of their own: a user's may hold tile sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield

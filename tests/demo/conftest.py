"""A demo over a tiny model."""

import pytest
from small_models import CONTEXT, write_model

import minference_jax
from minference_jax.demo.models import Models
from minference_jax.demo.service import Request, Service
from minference_jax.demo.settings import Settings
from minference_jax.measure.energy import EnergyCounter

ROOM = 4096  # tokens; the tiny model's tokens are bytes, and the shortest example has some hundreds


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny")
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'embeddings": {CONTEXT}', f'embeddings": {ROOM}'))
    return minference_jax.load(folder)


def service_of(model, read=lambda: None, reason="a test has no card", **settings):
    """Give a service of a model, which is loaded."""
    settings = {"max_prompt_tokens": 1000, "max_new_tokens": 6, **settings}
    models = Models({"tiny": None}, lambda source: model)
    models.get("tiny")
    return Service(Settings(**settings), models, EnergyCounter(read, reason))


@pytest.fixture
def make_service(model):
    """Makes services of the tiny model; they are closed at the end."""
    made = []

    def make(*arguments, **options):
        made.append(service_of(model, *arguments, **options))
        return made[-1]

    yield make
    for service in made:
        service.device.close()


@pytest.fixture(scope="session")
def browser_service(model):
    """The service behind all browser tests; a queue of one."""
    return service_of(model, max_queue=1, max_prompt_tokens=1500)


@pytest.fixture
def make_request():
    def make(text="Some words to read.", question="Who?", **changes):
        asked = {"model": "tiny", "text": text, "question": question, "attention": "a_shape"}
        asked |= {"sizes": {"sink_size": 8, "window_size": 16}, "slash_granularity": "line"}
        return Request(**(asked | changes))

    return make

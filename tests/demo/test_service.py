"""What visitors may ask of the demo, and what they get, without a browser and without Gradio."""

import gc
import math
import threading
import time

import jax
import pytest

from minference_jax import load
from minference_jax.demo import runs
from minference_jax.demo.models import Models, labels_of
from minference_jax.demo.needle import make_example, prose
from minference_jax.demo.service import outcome
from minference_jax.demo.settings import Refused
from minference_jax.measure import compare, encode_question


def finish(job):
    for _ in range(12_000):
        job.seen()
        if job.done:
            return outcome(job)
        time.sleep(0.01)
    pytest.fail("the job does not end")


def test_run_gives_what_the_command_line_gives(make_service, make_request, model, monkeypatch):
    monkeypatch.setattr(runs, "LEAST_SECONDS", 0)
    service, request = make_service(read=iter(range(0, 1000, 10)).__next__, repeats=2), make_request()
    job = service.submit_run("visitor", request)
    assert finish(job) == ""
    state = job.state
    prompt = encode_question(model, request.text, request.question)
    options = {"implementation": None, "max_new_tokens": 6, "repeats": 1}
    expected = compare(model, prompt.tokens, attention=request.chosen(), **options)
    assert (state.dense.answer, state.sparse.answer) == (expected.dense.text, expected.sparse.text)
    found = state.comparison
    assert (found.agreed, found.compared) == (expected.agreed, expected.compared)
    assert found.density == pytest.approx(expected.density)
    assert state.pays_from == model.pays_from(request.chosen().pattern)
    assert found.max_logit_difference == pytest.approx(expected.max_logit_difference, rel=1e-3)
    assert found.speedup == found.dense.median_seconds / found.sparse.median_seconds
    assert [len(side.seconds) for side in (state.dense, state.sparse)] == [2, 2]
    assert (state.dense.joules, state.sparse.joules) == (20, 20)  # 10 between each two readings, two runs each
    assert (state.tokens, state.step) == (len(prompt.tokens), "")
    (point,) = service.history.of("tiny")
    assert (point.dense_seconds, point.sparse_seconds) == (found.dense.median_seconds, found.sparse.median_seconds)
    assert (point.tokens, point.attention) == (state.tokens, "a_shape 8, 16")
    assert not any(request.text in str(part) for part in point)


def test_answers_stream_and_a_cancelled_run_stops_between_tokens(make_service, make_request, monkeypatch):
    service = make_service(max_new_tokens=50)
    seen = []

    class Watch:
        def __init__(self, job):
            self.job = job

        def __call__(self):
            seen.append((self.job.state.dense.answer, self.job.state.sparse.answer))
            if len(seen) == 20:
                self.job.cancel()
            return type(self.job).check(self.job)

    submit = service.device.submit

    def watched(visitor, work):
        def begin(job):
            job.check = lambda: Watch(job)() if job.state and "answering" in job.state.step else None
            work(job)

        return submit(visitor, begin)

    monkeypatch.setattr(service.device, "submit", watched)
    job = service.submit_run("visitor", make_request())
    assert finish(job) == "Cancelled."
    assert len(seen) == 20
    lengths = [len(dense) + len(sparse) for dense, sparse in seen]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 0
    assert job.state.comparison is None
    assert service.history.of("tiny") == []


def test_inspection_gives_a_picture_and_passages(make_service, make_request, model):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    service = make_service()
    job = service.submit_inspection("visitor", make_request(), 1, 2.0)
    assert finish(job) == ""
    state = job.state
    assert state.picture.startswith("data:image/png;base64,")
    assert (state.layer, state.head, state.num_heads) == (1, 2, 8)
    assert state.left_out
    for layer, head in ((2, 0), (0, 4), (-1, 0)):
        assert finish(service.submit_inspection("visitor", make_request(), layer, head)).startswith(
            "The model has layers"
        )
    with pytest.raises(Refused, match="whole numbers"):
        service.submit_inspection("visitor", make_request(), 0.5, None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"text": " \n"}, "There is no text"),
        ({"question": ""}, "There is no question"),
        ({"text": "a" * 1200}, "tokens, and this demo reads at most 1,000: shorten the text by about 2"),
        ({"text": "a" * 24_001}, "characters, and this demo takes at most 24,000"),
        ({"attention": "flash"}, "no such attention"),
        ({"attention": "dense"}, "no such attention"),
        ({"slash_granularity": "page"}, "no such attention"),
        ({"sizes": {"sink_size": 8, "window_size": 0}}, "window_size must be between 1 and 1,000,000, not 0"),
        ({"sizes": {"sink_size": 1e300, "window_size": 1}}, "sink_size must be between"),
        ({"sizes": {"sink_size": 1.5, "window_size": 1}}, "sink_size must be a whole number"),
        ({"sizes": {"sink_size": math.nan, "window_size": 1}}, "sink_size must be a whole number"),
        ({"sizes": {"sink_size": math.inf, "window_size": 1}}, "sink_size must be a whole number"),
        ({"sizes": {"sink_size": "8", "window_size": 1}}, "sink_size must be a whole number"),
        ({"sizes": {"window_size": 1}}, "sink_size must be a whole number"),
    ],
)
def test_what_is_not_offered_is_refused_before_it_waits(make_service, make_request, changes, sentence):
    with pytest.raises(Refused, match=sentence):
        make_service().submit_run("visitor", make_request(**changes))


def test_text_and_answer_must_have_room_in_the_model(make_service, make_request):
    service = make_service(max_prompt_tokens=4096, max_new_tokens=3500)
    with pytest.raises(Refused, match="the answer up to 3500, and tiny has room for 4,096 in all"):
        service.submit_run("visitor", make_request(text="a" * 700))


def test_visitors_choose_among_the_operators_models_only(make_service, make_request, model):
    asked = []
    models = Models(labels_of(["/home/somebody/one", "organisation/two"]), lambda source: asked.append(source) or model)
    assert models.labels == ["one", "two"]
    assert models.get("one") is models.get("one")
    assert models.in_memory("two") is None
    models.get("two")
    assert models.in_memory("one") is None
    for label in ("/etc", "../one", "organisation/other", "/home/somebody/one", ""):
        with pytest.raises(Refused, match="no such model"):
            models.get(label)
    assert asked == ["/home/somebody/one", "organisation/two"]
    with pytest.raises(ValueError, match="two models are called one"):
        labels_of(["a/one", "b/one"])
    assert finish(make_service().submit_run("visitor", make_request(model="/etc"))) == "There is no such model here."


def test_fault_in_loading_is_told_to_the_operator_not_to_the_visitor(make_service, make_request, capsys):
    service = make_service()
    service.models = Models({"big": "/secret/big"}, lambda source: load(source))
    said = finish(service.submit_run("visitor", make_request(model="big")))
    assert said == "big can't be loaded; the operator's terminal says why."
    assert "/secret/big" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), NotImplementedError("no such layer")])
def test_model_that_cannot_be_loaded_is_not_the_texts_fault(make_service, make_request, error):
    def load_nothing(source):
        raise error

    service = make_service()
    service.models = Models({"big": None}, load_nothing)
    said = finish(service.submit_run("visitor", make_request(model="big")))
    assert said.startswith("big needs more memory" if isinstance(error, MemoryError) else "big can't be loaded")


def test_energy_of_short_prefills_is_not_told(make_service, make_request):
    service = make_service(read=iter(range(1000)).__next__)
    job = service.submit_run("visitor", make_request())
    assert finish(job) == ""
    assert (job.state.dense.joules, job.state.sparse.joules) == (None, None)


def test_auto_that_took_dense_attention_is_no_point_of_the_plot(make_service, make_request):
    service = make_service()
    job = service.submit_run("visitor", make_request(attention="auto"))
    assert finish(job) == ""
    assert job.state.comparison.density is None
    assert service.history.of("tiny") == []


def test_answers_hold_one_cache_beside_those_of_the_prompt(model, make_request):
    request = make_request(text="Some words to read. " * 12)  # more tokens than a tail has room for
    tokens = encode_question(model, request.text, request.question).tokens
    shape = model.prefill(tokens, attention="dense").cache.k.shape
    gc.collect()
    counts = []

    def on_token(side, token):
        counts.append((side, sum(array.shape == shape for array in jax.live_arrays())))

    options = {"implementation": None, "max_new_tokens": 3, "repeats": 1, "on_token": on_token}
    compare(model, tokens, attention=request.chosen(), **options)
    assert counts[0] == ("dense", 4)  # keys and values of two prompts, which decoding may then drop
    assert counts[2] == ("dense", 4)  # decoding reads them where they are: no copy has come
    assert counts[-1] == ("sparse", 2)


def test_too_little_memory_for_an_answer_is_a_memory_error(model, make_request, monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    prefilled = model.prefill([1, 2, 3], attention="dense")
    stream = model.decode(prefilled, max_new_tokens=3)
    next(stream)
    monkeypatch.setattr("minference_jax.generate.decoding.read_token", fail)
    with pytest.raises(MemoryError, match="an answer of up to 3 tokens after 3 needs more memory"):
        next(stream)


def test_programs_are_dropped_where_visitors_asked_for_very_many(make_service, monkeypatch):
    cleared = []
    monkeypatch.setattr("minference_jax.demo.service.jax.clear_caches", lambda: cleared.append(1))
    service = make_service()
    for number in (*range(64), *range(64)):
        service._forget_programs(number)
    assert not cleared
    service._forget_programs(64)
    assert cleared == [1]


@pytest.mark.parametrize("depth", [0, 0.4, 1])
def test_example_hides_a_number_at_its_depth(model, depth):
    example = make_example(model, 2000, depth)
    assert example.number in example.text
    assert example.number not in example.question
    assert 1500 < example.tokens <= 2000
    assert example.tokens == len(encode_question(model, example.text, example.question).tokens)
    place = example.text.index(example.number) / len(example.text)
    assert abs(place - depth) < 0.2


def test_long_example_repeats_the_prose(model):
    example = make_example(model, 70_000, 0.5)
    assert 69_000 < example.tokens <= 70_000
    assert example.text.count(prose()[:200].strip()) >= 2


def test_example_of_a_model_in_memory_waits_for_nobody_and_mistakes_are_refused(make_service):
    service, go = make_service(), threading.Event()
    service.device.submit("visitor", lambda job: go.wait(60))
    job = service.submit_example("visitor", "tiny", 900.0, 0.25)
    assert job.done
    go.set()
    assert finish(job) == ""
    assert job.state.tokens <= 900
    assert "too few for an example" in finish(service.submit_example("visitor", "tiny", 10, 0.5))
    for length, depth in (
        (1001, 0.5),
        ("900", 0.5),
        (900, None),
        (math.nan, 0),
        (900, 2),
        (900, 10**400),
        (900, math.nan),
    ):
        with pytest.raises(Refused):
            service.submit_example("visitor", "tiny", length, depth)

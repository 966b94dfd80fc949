"""The line before the device: one job at a time, of bounded length, and every job can be cancelled."""

import asyncio
import gc
import threading
import time
import weakref

import pytest

from minference_jax.demo import jobs, service
from minference_jax.demo.jobs import Cancelled, Device
from minference_jax.demo.service import follow, outcome
from minference_jax.demo.settings import Refused


@pytest.fixture
def device():
    device = Device(max_queue=2)
    yield device
    device.close()


def wait_for(job):
    for _ in range(1000):
        if job.done:
            return
        time.sleep(0.01)
    pytest.fail("the job does not end")


def held(device, visitor="someone"):
    """Gives a job that runs until the event, which comes with it, is set."""
    begun, go = threading.Event(), threading.Event()

    def work(job):
        begun.set()
        while not go.wait(0.01):
            job.check()

    job = device.submit(visitor, work)
    assert begun.wait(10)
    return job, go


def test_jobs_run_one_at_a_time_in_order(device):
    order, running = [], []

    def work(job):
        running.append(job)
        assert len(running) == 1
        time.sleep(0.02)
        running.remove(job)
        order.append(job)

    made = [device.submit(f"visitor {i}", work) for i in range(3)]
    for job in made:
        wait_for(job)
        assert outcome(job) == ""
    assert order == made


def test_line_is_bounded_and_a_visitor_has_one_job(device):
    first, go = held(device)
    with pytest.raises(Refused, match="not over yet"):
        device.submit("someone", lambda job: None)
    second, third = (device.submit(name, lambda job: None) for name in ("second", "third"))
    assert [device.before(job) for job in (first, second, third)] == [0, 1, 2]
    with pytest.raises(Refused, match="2 runs wait already"):
        device.submit("fourth", lambda job: None)
    go.set()
    wait_for(third)
    wait_for(device.submit("fourth", lambda job: None))


def test_cancelled_job_frees_the_device_for_the_next(device):
    first, _ = held(device)
    second = device.submit("next", lambda job: None)
    assert device.cancel("someone")
    wait_for(second)
    assert (outcome(first), outcome(second)) == ("Cancelled.", "")
    assert not device.cancel("someone")


def test_job_that_is_cancelled_while_it_waits_never_begins(device):
    _, go = held(device)
    begun = []
    waiting = device.submit("waiting", begun.append)
    waiting.cancel()
    assert waiting.done
    assert outcome(waiting).startswith("Cancelled")
    go.set()
    wait_for(device.submit("last", lambda job: None))
    assert not begun


def test_job_that_nobody_follows_stops(device, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 0.05)
    job, _ = held(device)
    wait_for(job)
    with pytest.raises(Cancelled):
        job.result()


@pytest.mark.parametrize("listens", [True, False])
def test_job_stops_where_its_visitor_does_not_listen_even_if_the_server_follows(device, monkeypatch, listens):
    monkeypatch.setattr(jobs, "PATIENCE", 2.0)
    monkeypatch.setattr(service, "_POLL_SECONDS", 0.02)
    job, go = held(device)
    end = time.monotonic() + 3

    async def watch():
        async for _ in follow(job, lambda: listens):
            if time.monotonic() > end:
                go.set()

    asyncio.run(watch())
    assert outcome(job) == ("" if listens else "Cancelled.")


def test_job_whose_visitor_went_away_holds_no_place_in_the_queue(device, monkeypatch):
    _, go = held(device)
    waiting = [device.submit(name, lambda job: None) for name in ("second", "third")]
    monkeypatch.setattr(jobs, "PATIENCE", -1)
    device.submit("fourth", lambda job: None)
    assert all(job.cancelled for job in waiting)
    go.set()


@pytest.mark.parametrize(
    ("max_queue", "said"), [(0, "Somebody else's run is not over yet:"), (1, "1 run waits already:")]
)
def test_full_queue_is_told_in_the_right_number(max_queue, said):
    device = Device(max_queue)
    _, go = held(device)
    for number in range(max_queue):
        device.submit(str(number), lambda job: None)
    with pytest.raises(Refused, match=said):
        device.submit("last", lambda job: None)
    go.set()
    device.close()


def test_job_is_cancelled_when_its_page_goes_away(device):
    job, _ = held(device)

    async def watch():
        steps = follow(job, lambda: True)
        await anext(steps)
        await steps.aclose()

    asyncio.run(watch())
    assert job.cancelled
    wait_for(job)


def test_outcomes_are_sentences_and_faults_of_ours_are_raised(device):
    cases = [
        (Refused("No."), "No."),
        (MemoryError(), "The device has too little memory for a text of this length: shorten it."),
        (ValueError("sizes are wrong"), "This can't be run: sizes are wrong."),
    ]
    for error, sentence in cases:
        wait_for(job := device.submit("someone", lambda job, error=error: throw(error)))
        assert outcome(job) == sentence
    wait_for(job := device.submit("someone", lambda job: throw(ZeroDivisionError("ours"))))
    with pytest.raises(ZeroDivisionError):
        outcome(job)


def throw(error):
    raise error


@pytest.mark.parametrize("error", [Cancelled(), ValueError("no"), KeyError("a fault")])
def test_work_that_fails_leaves_nothing_on_the_device(device, error, capsys):
    class Array:
        pass

    arrays = []

    def work(job):
        array = Array()
        arrays.append(weakref.ref(array))
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            raise error  # noqa: B904

    gc.disable()
    try:
        job = device.submit("one", work)
        wait_for(job)
        with pytest.raises(type(error)):
            job.result()
        assert arrays[0]() is None
    finally:
        gc.enable()
    assert ("KeyError" in capsys.readouterr().err) == isinstance(error, KeyError)

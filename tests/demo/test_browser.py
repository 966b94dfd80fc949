"""The demo in a real browser: paste, run, upload, cancel, over-long texts, two visitors, a phone."""

import gc
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import odd_demo_files as odd
import pytest

from minference_jax.demo import jobs
from minference_jax.demo.plots import History
from minference_jax.demo.service import outcome
from minference_jax.measure import attention_of, device_name

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECRET = "Zanzibar"
TEXT = f"Sir Walter lives in {SECRET} Hall."  # as short as those of test_service, so that the same programs read it
MOST_MS = 120_000  # for what compiles on a busy machine


def missing():
    """Say what a browser test lacks here; empty where it lacks nothing."""
    for package in ("gradio", "pypdf", "matplotlib", "playwright"):
        try:
            __import__(package)
        except ImportError:
            return f"{package} is not installed: it is in the extras demo and browser"
    return "" if CHROMIUM else "there is no Chromium"


@pytest.fixture(scope="module")
def browser():
    if reason := missing():
        if os.environ.get("MINFERENCE_JAX_NEEDS_BROWSER"):  # set in the gate, where nothing of this may be skipped
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:  # each start has a profile of its own
        found = playwright.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(browser, browser_service):
    """Serves a demo; gives its address."""
    from minference_jax.demo.server import serving

    attention = attention_of("a_shape", {"sink_size": 8, "window_size": 16})
    with serving(browser_service, attention, example_tokens=1400, host="127.0.0.1", port=None) as served:
        yield served


@pytest.fixture
def demo(address, browser_service):
    """Gives service and address, without runs and jobs of the tests before."""
    settings, browser_service.history = browser_service.settings, History()
    yield browser_service, address
    browser_service.settings = settings
    until(lambda: all(job.done for _, job in browser_service.device._jobs))


@pytest.fixture
def visit(browser, demo):
    """Opens the demo as another visitor each time; fails where a page asks another site or has an error."""
    _, address = demo
    contexts, wrong = [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(MOST_MS)
        page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((address, "data:")) else 0)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#run")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def paste(page, text=TEXT, question="What is it called?"):
    page.fill("#text textarea", text)
    page.fill("#question textarea", question)


def wait_for(page, words, where="#status"):
    page.wait_for_function(
        "([where, words]) => document.querySelector(where).innerText.includes(words)", arg=[where, words]
    )


def hold(service):
    """Occupies the device until the event, which is given, is set."""
    begun, go = threading.Event(), threading.Event()

    def work(job):
        begun.set()
        go.wait(10 * MOST_MS / 1000)

    service.device.submit("somebody else", work)
    assert begun.wait(60)
    return go


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def set_number(page, field, value):
    """Types a number until it stays: Gradio gives a field that it has just drawn its first value once more."""

    def stays():
        page.fill(field, value)
        page.wait_for_timeout(100)
        return page.input_value(field) == value

    until(stays)
    page.press(field, "Enter")


def until(true):
    end = time.monotonic() + MOST_MS / 1000
    while time.monotonic() < end:
        if true():
            return
        time.sleep(0.02)
    pytest.fail("it does not happen")


def test_pasted_text_is_run_and_both_answers_are_shown(visit, demo, capfd):
    service, address = demo
    page = visit()
    assert device_name() in page.inner_text(".intro .where")
    paste(page)
    page.click("#run")
    wait_for(page, "Done.")
    answers = page.locator("#answers .answer .text").all_inner_texts()
    (point,) = service.history.of("tiny")
    assert len(answers) == 2
    assert all(answer.strip() for answer in answers)
    assert page.locator("#numbers .value").all_inner_texts()[2] == f"{point.dense_seconds / point.sparse_seconds:.2f}×"
    assert f"{point.tokens} tokens" in page.inner_text("#numbers")
    for name in ("#details", "#history", "#inspect"):
        page.click(f"{name} button >> nth=0")
    assert "not measured: a test has no card" in page.inner_text("#details")
    page.wait_for_selector("#history img")
    page.click("#show")
    page.wait_for_selector("#kept img")
    wait_for(page, "heads", "#kept")
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert files_in(folder) == []  # no picture, no text
    for path in ("info", "file=/etc/passwd"):
        assert page.request.get(f"{address}gradio_api/{path}").status == 404


def test_uploads_are_read_into_the_page_and_deleted(visit, demo, tmp_path):
    page, folder = visit(), Path(os.environ["GRADIO_TEMP_DIR"])
    files = {
        "words.txt": b"Words of mine.",
        "page.pdf": odd.GOOD,
        "nul.txt": b"a\0b",
        "wrong.pdf": b"Words.",
        "a.exe": b"MZ",
    }
    said = ["Read 14 characters", "Read 17 characters", "binary, not text", "is not what its name", "must end in"]
    shown = ["Words of mine.", *(4 * ["Hello from a page"])]
    for (name, raw), sentence, text in zip(files.items(), said, shown, strict=True):
        (tmp_path / name).write_bytes(raw)
        page.set_input_files("input[type=file]", tmp_path / name)
        wait_for(page, sentence)
        until(lambda text=text: page.input_value("#text textarea") == text)
        until(lambda: not any(map(size, files_in(folder))))


def test_over_long_text_is_refused_in_a_sentence(visit):
    page = visit()
    paste(page, "word " * 400)
    page.click("#run")
    wait_for(page, "and this demo reads at most 1,500: shorten the text")
    paste(page, "word " * 8000)
    page.click("#run")
    wait_for(page, "characters, and this demo takes at most 36,000")
    assert page.is_enabled("#run")


def test_second_visitor_waits_a_third_is_sent_away_and_a_cancelled_run_frees_the_device(visit, demo):
    service, _ = demo
    go = hold(service)
    second, third = visit(), visit()
    for page in (second, third):
        paste(page)
    second.click("#run")
    wait_for(second, "Waiting: 1 run is before yours.")
    third.click("#run")
    wait_for(third, "1 run waits already")
    second.click("#cancel")
    wait_for(second, "Cancelled.")
    third.click("#run")
    wait_for(third, "Waiting: 1 run is before yours.")
    go.set()
    wait_for(third, "Done.")
    assert second.is_enabled("#run")
    assert second.locator("#numbers .value").all_inner_texts() == ["–"] * 3  # a visitor sees no other's run
    second.click("#run")
    wait_for(second, "Done.")


def test_run_is_cancelled_between_two_prefills(visit, demo):
    service, _ = demo
    service.settings = replace(service.settings, repeats=1_000_000)
    page = visit()
    paste(page)
    page.click("#run")
    wait_for(page, "of 1000000")
    page.click("#cancel")
    wait_for(page, "Cancelled.")
    assert page.is_enabled("#run")
    assert service.history.of("tiny") == []


def test_closed_page_frees_the_device(visit, demo):
    service, _ = demo
    go = hold(service)
    page = visit()
    paste(page)
    page.click("#run")
    wait_for(page, "Waiting")
    ((_, job),) = [(owner, job) for owner, job in service.device._jobs if owner != "somebody else"]
    assert SECRET in kept()
    page.close()
    until(lambda: job.cancelled)
    go.set()
    until(lambda: job.done)
    assert service.history.of("tiny") == []
    until(lambda: SECRET not in kept())


def kept():
    """Give all that Gradio keeps of visitors."""
    from gradio.state_holder import StateHolder

    holders = [thing for thing in gc.get_objects() if isinstance(thing, StateHolder)]
    return repr([state.config_values for holder in holders for state in holder.session_data.values()])


def test_client_that_does_not_listen_loses_the_device_and_one_that_does_keeps_it(visit, demo, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 3.0)
    service, address = demo
    go = hold(service)
    for _, job in service.device._jobs:
        job.check = lambda: None
    page = visit()
    paste(page)
    page.click("#run")
    wait_for(page, "Waiting")
    config = page.request.get(f"{address}config").json()
    (run,) = (one for one in config["dependencies"] if "run" in one["api_name"] and len(one["inputs"]) == 10)
    values = {one["id"]: one["props"].get("value") for one in config["components"]}
    service.device._max_queue = 3
    asked = {"data": [values[i] for i in run["inputs"]], "fn_index": run["id"], "session_hash": "ghost"}
    assert page.request.post(f"{address}gradio_api/queue/join", data=asked).ok
    until(lambda: len(service.device._jobs) == 3)
    listening, ghost = (job for _, job in service.device._jobs[1:])
    until(lambda: ghost.is_forsaken)
    assert not listening.is_forsaken
    service.device._max_queue = 1
    go.set()
    until(lambda: ghost.done)
    wait_for(page, "Done.")
    assert outcome(ghost) == "Cancelled."


def test_example_is_taken_at_its_length_and_depth(visit):
    page = visit()
    first = page.input_value("#text textarea")
    page.click("#example button >> nth=0")
    assert page.input_value("#length input[type=number]") == "1400"
    set_number(page, "#depth input[type=number]", "1")
    page.click("#make")
    until(lambda: page.input_value("#text textarea") != first)
    assert "special magic" in page.input_value("#text textarea")[-200:]


@pytest.mark.parametrize("width", [360, 1280])
def test_page_is_never_wider_than_the_screen(visit, width):
    page = visit(viewport={"width": width, "height": 740})
    paste(page, "w" * 400)
    for name in ("#example", "#attention", "#details", "#inspect"):
        page.click(f"{name} button >> nth=0")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width

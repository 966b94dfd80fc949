"""Smaller parts of the demo: what is drawn, the energy counter, the shield before the server, the command."""

import asyncio
import json
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_models import write_model

from minference_jax.cli import main
from minference_jax.demo import needle, views
from minference_jax.demo.plots import History, Point, history_picture
from minference_jax.demo.runs import RunState, Side, first_attention
from minference_jax.demo.shield import Shield, is_inside, remove_strays
from minference_jax.demo.visitors import Visitors
from minference_jax.measure import Answer, Comparison, attention_of, energy

ANSWER = {"implementation": "xla", "compile_seconds": None, "tokens": (1,), "text": ""}
FOUND = Comparison(
    dense=Answer(seconds=(20.0,), **ANSWER),
    sparse=Answer(seconds=(5.0,), **ANSWER),
    density=np.array([[0.2, 0.3]]),
    agreed=3,
    compared=4,
    max_logit_difference=0.5,
    peak_bytes=2_000_000_000,
    peak_of="process",
)
STATE = RunState(attention_of("a_shape"), tokens=4000, dense=Side(2.0, (20.0,), None, "It is <b>red</b> now."))
STATE = replace(STATE, sparse=Side(None, (5.0,), None, "It is <b>blue</b> now."), comparison=FOUND)


def test_example_in_the_package_is_the_one_of_the_repository():
    assert needle.prose() == (Path(__file__).parents[2] / "examples/persuasion.txt").read_text("utf-8")


def test_differing_words_are_marked_and_everything_is_escaped():
    assert views.mark_differences("one two three", "one 2 three") == (
        "one <mark>two </mark>three",
        "one <mark>2 </mark>three",
    )
    assert views.mark_differences("It is: 7", "It is 7.") == ("It is<mark>: </mark>7", "It is 7<mark>.</mark>")
    page = views.answers(STATE)
    assert "&lt;b&gt;<mark>red</mark>&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "The answers are the same" in views.answers(replace(STATE, sparse=STATE.dense))
    assert "<script>" not in views.note("<script>")


def test_numbers_are_dashes_then_run_then_stand():
    assert views.numbers(None, 0.0).count("–") == 3
    running = replace(STATE, comparison=None, active="dense", is_timed=True, began=100.0)
    assert "12.5 s" in views.numbers(running, 112.5)
    done = views.numbers(STATE, 0.0)
    assert all(part in done for part in ("20.0 s", "5.00 s", "4.00×", "4,000 tokens", "density 0.25", "2.00 GB"))
    assert "slower" not in done


def test_page_says_why_sparse_is_slower_and_from_which_length_it_pays():
    slow = replace(STATE, comparison=replace(FOUND, sparse=FOUND.dense, dense=FOUND.sparse), pays_from=16384)
    assert "slower here: what it takes to leave keys out" in views.numbers(slow, 0.0)
    assert "pays from about 16,384 tokens on this device" in views.numbers(slow, 0.0)
    assert "rule of thumb" not in views.numbers(replace(slow, pays_from=4000), 0.0)
    assert "half or more of the heads dense it is not expected" in views.numbers(replace(slow, pays_from=None), 0.0)
    auto = replace(slow, attention=attention_of("auto"), comparison=replace(slow.comparison, density=None))
    shown = views.numbers(auto, 0.0)
    assert all(words in shown for words in ("auto took dense attention", "Dense attention ran twice", "16,384"))


def test_page_begins_with_attention_that_can_pay(model):
    pays = model.pays_from()
    assert first_attention(model, pays, None) == attention_of("minference")
    smaller = first_attention(model, pays - 1, None)
    assert smaller.name == "vertical_slash"
    assert model.pays_from(smaller.pattern) <= pays - 1


def test_slashes_are_told_of_attention_that_has_them():
    assert "slashes" not in views.details(STATE, no_energy="")
    assert "slashes" in views.details(replace(STATE, attention=attention_of("auto")), no_energy="")


def test_energy_is_shown_where_it_is_measured_and_else_why_not():
    assert "not measured: no card" in views.details(STATE, no_energy="no card")
    measured = replace(STATE, dense=replace(STATE.dense, joules=900.0), sparse=replace(STATE.sparse, joules=300.0))
    assert "900 J dense, 300 J sparse" in views.numbers(measured, 0.0)
    assert "300 J" in views.details(measured, no_energy="")
    assert "too short for the card" in views.details(STATE, no_energy="")


def test_plot_is_of_the_runs_of_one_model():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    history = History()
    assert history_picture(history.of("a")) == ""
    for tokens in (4000, 2000):
        history.add(Point("a", "a_shape 1, 2", tokens, 2.0, 1.0))
    history.add(Point("b", "minference", 100, 2.0, 1.0))
    assert [point.tokens for point in history.of("a")] == [4000, 2000]
    assert history_picture(history.of("a")).startswith("data:image/png;base64,")
    for number in range(300):
        history.add(Point("a", "a_shape 1, 2", number, 2.0, 1.0))
    assert len(history.of("a")) == 200


class Card:
    """What energy asks of pynvml, for two cards of which CUDA sees the second."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, name):
        self.name, self.asked = name, []

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByIndex(self, index):
        self.asked.append(index)

    def nvmlDeviceGetHandleByUUID(self, name):
        self.asked.append(name)

    def nvmlDeviceGetName(self, handle):
        return self.name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 12_500


@pytest.mark.parametrize(("visible", "asked"), [(None, 0), ("1", 1), ("GPU-abc,GPU-def", "GPU-abc")])
def test_energy_is_that_of_the_card_that_cuda_shows(monkeypatch, visible, asked):
    card = Card("NVIDIA A1")
    device = SimpleNamespace(platform="gpu", local_hardware_id=0, device_kind="NVIDIA A1")
    monkeypatch.setattr(energy.jax, "devices", lambda: [device])
    monkeypatch.setitem(sys.modules, "pynvml", card)
    counter = energy.open_counter(visible)
    assert (counter.read(), counter.reason, card.asked) == (12.5, "", [asked])
    monkeypatch.setitem(sys.modules, "pynvml", Card("NVIDIA A2"))
    counter = energy.open_counter(None)
    assert counter.read() is None
    assert "not clear which one computes" in counter.reason


def test_there_is_no_energy_counter_on_a_cpu(monkeypatch):
    monkeypatch.setattr(energy.jax, "devices", lambda: [SimpleNamespace(platform="cpu")])
    assert energy.open_counter(None).reason == "energy is measured on NVIDIA GPUs only"


def asks(folder, *, path="/gradio_api/queue/join", method="POST", headers=(), chunks=(b"",), query=b"", visitors=None):
    """Sends a request through a shield; gives the status that came back, and the body that came through."""
    got, sent = [], []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            got.append(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    parts = [{"type": "http.request", "body": body, "more_body": True} for body in chunks]
    parts[-1]["more_body"] = False
    queue = iter(parts)

    async def receive():
        return next(queue)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "query_string": query}
    visitors = Visitors() if visitors is None else visitors
    shield = Shield(app, max_body=100, folder=folder, max_folder=50, visitors=visitors)
    asyncio.run(shield(scope, receive, send))
    return sent[0]["status"], b"".join(got), dict(sent[0]["headers"]), sent[-1].get("body")


def test_shield_bounds_bodies_and_uploads_and_keeps_the_page_at_home(tmp_path):
    upload = {"path": "/gradio_api/upload"}
    status, body, headers, _ = asks(tmp_path, chunks=[b"a" * 50, b"b" * 50], **upload)
    assert (status, len(body)) == (200, 100)
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    for said in (b"101", b"-1", b"many"):
        assert asks(tmp_path, headers=[(b"content-length", said)])[0] == 413
    assert (
        len(asks(tmp_path, chunks=[b"a" * 60, b"b" * 60, b"c" * 60], **upload)[1]) == 60
    )  # it does not say its length
    assert asks(tmp_path, chunks=[b'["', b"b" * 60, b'c"]' * 60])[0] == 400
    lies_about = tmp_path / "lies-about"
    lies_about.write_bytes(bytes(51))
    assert asks(tmp_path, **upload)[0] == 503
    assert asks(tmp_path)[0] == 200
    os.utime(lies_about, (0, 0))  # broken off long ago
    assert asks(tmp_path, **upload)[0] == 200
    assert not lies_about.exists()


def test_what_lies_in_the_folder_goes_after_a_minute_at_any_depth(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a")
    for path in (tmp_path / "old" / "a.txt", tmp_path / "old"):
        os.utime(path, (0, 0))
    remove_strays(tmp_path)
    os.utime(tmp_path / "old", (0, 0))
    remove_strays(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "new"]


def test_refusals_are_sentences_that_the_page_can_show(tmp_path):
    too_long = {"folder": tmp_path, "headers": [(b"content-length", b"101")]}
    _, _, headers, said = asks(**too_long, path="/gradio_api/queue/join")
    assert headers[b"content-type"] == b"application/json"
    assert json.loads(said) == {"detail": "This is more text than the demo reads: shorten it."}
    assert asks(**too_long, path="/gradio_api/upload")[3] == b"This is more text than the demo reads: shorten it."


def test_visitors_who_do_not_listen_for_a_while_are_silent(monkeypatch):
    visitors = Visitors()
    assert not visitors.is_silent("one")  # from now on
    monkeypatch.setattr("minference_jax.demo.jobs.PATIENCE", 0.0)
    with visitors.listening("one"):
        assert not visitors.is_silent("one")
    assert visitors.is_silent("one")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/process_recording"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/proxy=http://localhost/x"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/call/run"),
        ("GET", "/monitoring"),
        ("GET", "/openapi.json"),
        ("POST", "/login"),
        ("DELETE", "/"),
    ],
)
def test_shield_lets_through_only_what_the_page_asks_for(tmp_path, method, path):
    assert asks(tmp_path, method=method, path=path)[0] == 404
    assert asks(tmp_path, method="GET", path="/")[0] == 200


def test_shield_tells_who_listens_while_the_stream_is_open(tmp_path):
    seen = []

    class Watched(Visitors):
        def listening(self, visitor):
            seen.append(visitor)
            return super().listening(visitor)

    visitors = Watched()
    asks(tmp_path, method="GET", path="/gradio_api/queue/data", query=b"session_hash=ab%20c", visitors=visitors)
    asks(tmp_path, method="GET", path="/gradio_api/heartbeat/x", visitors=visitors)
    assert seen == ["ab c"]
    with visitors.listening("one"), visitors.listening("two"):
        with visitors.listening("one"):
            pass
        assert visitors.listens("one")
    assert not any(map(visitors.listens, ("one", "two", "ab c")))


def test_files_that_were_not_uploaded_here_are_refused(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "1").mkdir(parents=True)
    for path in ("http://a.example/b", "/etc/passwd", str(folder / ".." / "b"), 3, str(folder), str(folder / "1")):
        body = json.dumps({"data": [{"x": {"path": path}}]}).encode()
        assert asks(folder, chunks=[body])[0] == 400
        assert not is_inside(path, folder)
    assert is_inside(str(folder / "1" / "a.txt"), folder)
    assert asks(folder, chunks=[b"[" * 100])[0] == 400
    assert asks(folder, chunks=[b'{"data": ["path", 1]}'])[:2] == (200, b'{"data": ["path", 1]}')


def test_command_says_which_package_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert said == "minference-jax: error: the demo needs gradio: pip install 'minference-jax[demo]'\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attention", "dense"], "invalid choice"),
        (["--max-queue", "-1"], "'-1' must be an integer of at least 0"),
        (["--max-prompt-tokens", "0"], "'0' must be"),
        (["--port", "99999"], "'99999' must be a port"),
        (["--host", "192.0.2.1"], "192.0.2.1 can't be listened on: it is not an address of this machine"),
        (["--host", "a" * 70 + ".b"], "is no address and no name of a machine"),
        (["--implementation", "nope"], "implementation='nope' is not one of"),
        (["--example-tokens", "99", "--max-prompt-tokens", "98"], "--example-tokens 99 is more than the 98 tokens"),
        (["--model", "a/one", "--model", "b/one"], "two models are called one"),
        (["--vertical-size", "8"], "--vertical-size does not go with --attention minference"),
    ],
)
def test_command_refuses_options_in_a_sentence_before_a_model_is_loaded(options, said, capsys, monkeypatch):
    monkeypatch.setattr("minference_jax.cli.inputs.load", lambda *arguments, **options: pytest.fail("it loads"))
    needs_gradio(options)
    assert main(["demo", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def needs_gradio(options):
    if options[0] not in ("--attention", "--max-queue", "--max-prompt-tokens", "--port"):
        pytest.importorskip("gradio", reason="the demo needs its extra")


def test_taken_port_is_told_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("minference_jax.cli.inputs.load", lambda *arguments, **options: pytest.fail("it loads"))
    needs_gradio(["taken"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 can't be listened on: it is taken\n" in capsys.readouterr().err


def test_second_model_that_cannot_be_read_is_told_at_the_start(capsys, tmp_path):
    needs_gradio(["models"])
    write_model(tmp_path / "good")
    write_model(tmp_path / "bad", tokenizer=False)
    assert main(["demo", "--model", str(tmp_path / "good"), "--model", str(tmp_path / "bad")]) == 2
    assert "bad has no tokenizer files" in capsys.readouterr().err


def test_numbers_of_a_run_that_is_over_stand_still():
    assert views.numbers(STATE, 0.0) == views.numbers(STATE, time.monotonic())

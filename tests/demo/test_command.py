"""The command itself, as a process: where it listens, how large requests may be, how it ends."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from small_models import CONTEXT, write_model

PROGRAM = "import sys; from minference_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def length_of_model(folder, tokens):
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'embeddings": {CONTEXT}', f'embeddings": {tokens}'))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no 127.0.0.2")
def test_command_listens_on_this_machine_refuses_large_requests_and_cleans_up_when_it_is_ended(tmp_path):
    for package in ("gradio", "pypdf", "matplotlib"):
        pytest.importorskip(package, reason="the demo needs its extra")
    folder, temporary = length_of_model(write_model(tmp_path / "model"), 2000), tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-P", "-c", PROGRAM, "demo", "--model", str(folder)]
    environment = {**os.environ, "TMPDIR": str(temporary), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as server:
        try:
            address = server.stdout.readline()
            port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", address)[1])
            with pytest.raises(ConnectionRefusedError):  # which what listens on every address takes
                socket.create_connection(("127.0.0.2", port))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.putrequest("POST", "/gradio_api/upload")
            connection.putheader("content-length", str(10**8))
            connection.endheaders()
            assert connection.getresponse().status == 413
            assert list(temporary.glob("minference-jax-demo-*"))
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 130
        finally:
            server.kill()
    assert not list(temporary.glob("minference-jax-demo-*"))

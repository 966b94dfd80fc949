"""Starts the demo: a page on this machine, with nothing that Gradio would store, count or send."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from minference_jax.demo.needle import make_example
from minference_jax.demo.page import build_page
from minference_jax.demo.service import Service
from minference_jax.demo.settings import MAX_UPLOAD_BYTES
from minference_jax.demo.shield import Shield
from minference_jax.measure import ChosenAttention, device_name

MAX_FOLDER_BYTES = 20 * MAX_UPLOAD_BYTES
_VISITORS = 20  # of whom Gradio keeps what their pages show, until they leave
_BODY_EXTRA = 1_000_000  # bytes around a text or a file
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")


def check_extra() -> None:
    """Raises ValueError where a package of the extra `demo` is missing; better before a model is loaded."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        import gradio  # noqa: F401
        import matplotlib  # noqa: F401
        import pypdf  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the demo needs {error.name}: pip install 'minference-jax[demo]'") from None


def check_address(host: str, port: int | None) -> None:
    """Raises OSError, in a sentence, where an address can't be listened on; better before a model is loaded.

    Args:
        host, port: as `serving` takes them.
    """
    where = host if port is None else f"port {port} of {host}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(_bare(host), port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # elsewhere it would let two listen
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except UnicodeError:
        raise OSError(f"{host!r} is no address and no name of a machine") from None
    except OSError as error:
        why = "it is taken" if error.errno == errno.EADDRINUSE else "it is not an address of this machine"
        why = "this user may not" if error.errno == errno.EACCES else why
        raise OSError(f"{where} can't be listened on: {why}") from None


def _bare(host: str) -> str:
    """An address of IPv6 without the brackets that it has in a URL."""
    return host.removeprefix("[").removesuffix("]")


@contextmanager
def serving(
    service: Service, attention: ChosenAttention, *, example_tokens: int, host: str, port: int | None
) -> Iterator[str]:
    """Serves the demo inside the block; gives its address.

    Args:
        service: behind the page; it is closed at the end.
        attention: that the page begins with.
        example_tokens: length of the example that the page begins with.
        host: address to listen on; "127.0.0.1" = this machine only.
        port: None = the first free one from 7860 on.

    Raises:
        ValueError: a package of the extra is missing.
        OSError: the port is taken, or the host is not an address of this machine.
        Refused: no example has so few tokens.
    """
    check_extra()
    check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="minference-jax-demo-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = None
        try:
            example = make_example(service.models.get(service.models.labels[0]), example_tokens, 0.5)
            page = build_page(service, attention, example, device_name(), Path(folder))
            page.queue(api_open=False, max_size=8 * (service.settings.max_queue + 1))
            yield _launch(page, host, port, _options(service, folder))
        finally:
            if page is not None:
                page.close(verbose=False)
            service.device.close()
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def _launch(page: Any, host: str, port: int | None, options: dict[str, Any]) -> str:
    name = f"[{_bare(host)}]" if ":" in host else host
    try:
        return page.launch(server_name=name, server_port=port, **options)[1]
    except OSError:
        where = "the ports from 7860 to 7959" if port is None else f"port {port}"
        raise OSError(f"{where} of {host} can't be listened on: taken") from None


def _options(service: Service, folder: str) -> dict[str, Any]:
    import gradio as gr
    from starlette.middleware import Middleware

    max_body = max(MAX_UPLOAD_BYTES, 4 * service.settings.max_characters) + _BODY_EXTRA
    shield = Middleware(
        Shield, max_body=max_body, folder=Path(folder), max_folder=MAX_FOLDER_BYTES, visitors=service.visitors
    )
    style = resources.files("minference_jax.demo").joinpath("style.css").read_text("utf-8")
    return {
        "theme": gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=_MONO),
        "css": style,
        "prevent_thread_lock": True,
        "quiet": True,
        "share": False,
        "inbrowser": False,
        "show_error": False,
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "footer_links": [],
        "state_session_capacity": _VISITORS,
        "allowed_paths": [],
        "max_file_size": MAX_UPLOAD_BYTES,
        "app_kwargs": {"middleware": [shield]},
    }

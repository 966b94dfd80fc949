"""Pictures as data URIs: they are part of the page, and no file is written."""

from __future__ import annotations

import base64
import io
from collections import deque
from typing import NamedTuple

from minference_jax.inspection import Inspection
from minference_jax.inspection.pictures import draw_head

_MOST = 200  # runs that are kept
_MOST_NAMES = 6  # attentions in a picture
DENSE_COLOUR, SPARSE_COLOUR = "#475569", "#0f766e"


class Point(NamedTuple):
    """A run for the plot; nothing of its text.

    Attributes:
        model, attention: what ran.
        tokens: of the prompt.
        dense_seconds, sparse_seconds: medians.
    """

    model: str
    attention: str
    tokens: int
    dense_seconds: float
    sparse_seconds: float


class History:
    """The runs since the demo began, the last 200 of them."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=_MOST)

    def add(self, point: Point) -> None:
        """Adds a run."""
        self._points.append(point)

    def of(self, model: str) -> list[Point]:
        """The runs of a model, in order."""
        return [point for point in list(self._points) if point.model == model]


def history_picture(points: list[Point]) -> str:
    """Seconds against tokens, dense and the last few sparse attentions, as a data URI; empty where there is no run.

    Args:
        points: in order; of more than six attentions those that ran last are drawn.
    """
    from matplotlib.figure import Figure

    if not points:
        return ""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(point.attention for point in reversed(points)))[:_MOST_NAMES]
    points = sorted((point for point in points if point.attention in names), key=lambda point: point.tokens)
    tokens = [point.tokens for point in points]
    axes.plot(tokens, [point.dense_seconds for point in points], "o-", color=DENSE_COLOUR, label="dense")
    for place, name in enumerate(names):
        own = [point for point in points if point.attention == name]
        style = {"color": SPARSE_COLOUR} if place == 0 else {}
        axes.plot([p.tokens for p in own], [p.sparse_seconds for p in own], "s--", label=name, **style)  # type: ignore[arg-type]
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("seconds of a prefill")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.1 * max(max(p.dense_seconds, p.sparse_seconds) for p in points))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return _data_uri(out)


def head_picture(found: Inspection, layer: int, head: int) -> str:
    """The map of a head, as a data URI."""
    out = io.BytesIO()
    draw_head(found, layer, head, out, dpi=90)
    return _data_uri(out)


def _data_uri(png: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()

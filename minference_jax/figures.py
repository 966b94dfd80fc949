"""Whether pictures can be drawn, asked before the work whose results they are to show; they need matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def figure_class() -> Any:
    """matplotlib's Figure, which needs no screen.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "pictures need matplotlib, which is not installed: pip install 'minference-jax[plots]'"
        ) from None
    return Figure


def check_picture(path: str | os.PathLike[str]) -> None:
    """Whether a picture can be drawn to a file of this name; its ending says the kind, such as .png, .svg or .pdf.

    Raises:
        ValueError: matplotlib is not installed, or does not know the ending.
    """
    figure_class()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"{path}: a picture's name ends in one of {', '.join(sorted(known))}")

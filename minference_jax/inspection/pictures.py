"""Pictures of an inspection, as PNG, SVG or PDF files; they need matplotlib, the extra `plots`."""

from __future__ import annotations

import os
from typing import IO, Any

import numpy as np

from minference_jax.figures import check_picture, figure_class
from minference_jax.inspection.inspection import Inspection
from minference_jax.inspection.maps import HeadMap
from minference_jax.patterns.heads import KINDS

_KEPT_COLOUR = (0.10, 0.45, 0.85)
_KEPT_ALPHA = 0.45
_FLOOR = 1e-6  # share of attention below which a pixel is white


def draw_heat_maps(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Mass kept, output error, density and, where measured, expected time of every head, layers down, heads across.

    Args:
        inspection: to draw.
        path: of the picture; its ending says the kind, such as .png, .svg or .pdf.

    Raises:
        ValueError: matplotlib is not installed, or the file's name ends in something else.
        OSError: the file can't be written.
    """
    check_picture(path)
    parts: dict[str, tuple[np.ndarray, str, tuple[float, float | None]]] = {
        "attention mass kept": (inspection.mass, "viridis", (0, 1)),
        "output error, relative": (inspection.error, "magma_r", (0, 1)),
        "density of the computed tiles": (inspection.density, "cividis", (0, 1)),
    }
    if inspection.head_ms is not None:
        parts["expected time, ms"] = (inspection.head_ms, "cividis", (0, None))
    layers, heads = inspection.mass.shape
    size = (max(2.6, 0.16 * heads + 1.6) * len(parts), max(3.0, 0.16 * layers + 1.4))
    figure, axes = _figure(1, len(parts), size)
    for one, (title, (values, colours, (least, most))) in zip(axes[0], parts.items(), strict=True):
        image = one.imshow(values, cmap=colours, vmin=least, vmax=most, aspect="auto", interpolation="nearest")
        one.set_title(title, fontsize=9)
        one.set_xlabel("head")
        one.xaxis.get_major_locator().set_params(integer=True)
        one.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=one, extend="max" if most == 1 and values.max() > 1 else "neither")
    axes[0][0].set_ylabel("layer")
    figure.savefig(path, dpi=150)


def draw_head(
    inspection: Inspection, layer: int, head: int, path: str | os.PathLike[str] | IO[bytes], *, dpi: int = 150
) -> None:
    """One head's attention map in grey, on a logarithmic scale, with what is computed in blue over it.

    Args:
        inspection: with the map of that head.
        layer, head: which.
        path: of the picture, whose ending says the kind: .png, .svg or .pdf; or a binary file that is open, for a PNG.
        dpi: pixels of an inch; the picture has 7.2 by 6.4 inches.

    Raises:
        ValueError: matplotlib is not installed, the file's name ends in something else, or that map was not asked for.
        OSError: the file can't be written.
    """
    is_named = isinstance(path, str | os.PathLike)
    if is_named:
        check_picture(path)  # type: ignore[arg-type]
    found = inspection.maps.get((layer, head))
    if found is None:
        raise ValueError(f"the map of layer {layer}, head {head} was not computed: name it in `maps`")
    pattern = inspection.patterns.layers[layer][head]
    sizes = " ".join(f"{name}={value}" for name, value in vars(pattern).items())
    figure, axes = _figure(1, 1, (7.2, 6.4))
    one = axes[0][0]
    image = _draw_map(one, found)
    figure.colorbar(image, ax=one, label="share of a query's attention, dense, in a pixel")
    one.set_title(
        f"layer {layer}, head {head}: {KINDS[type(pattern)].name.lower()} {sizes}\n"
        f"blue: computed, density {inspection.density[layer, head]:.3f}; it holds "
        f"{inspection.mass[layer, head]:.1%} of the attention mass; output error {inspection.error[layer, head]:.3f}",
        fontsize=9,
    )
    one.set_xlabel("key, tokens")
    one.set_ylabel("query, tokens")
    figure.savefig(path, format=None if is_named else "png", dpi=dpi)  # None: as the name ends


def _draw_map(axes: Any, found: HeadMap) -> Any:
    from matplotlib.colors import LogNorm

    side = found.pixel * found.attention.shape[0]
    where = {"extent": (0, side, side, 0), "interpolation": "nearest"}
    causal = ~np.isnan(found.kept)
    shown = np.where(causal, np.maximum(found.attention, _FLOOR), np.nan)
    image = axes.imshow(shown, cmap="Greys", norm=LogNorm(_FLOOR, 1.0), **where)
    over = np.zeros((*found.kept.shape, 4))
    over[..., :3] = _KEPT_COLOUR
    over[..., 3] = _KEPT_ALPHA * np.where(causal, found.kept, 0.0)
    axes.imshow(over, **where)
    return image


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    figure = figure_class()(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)

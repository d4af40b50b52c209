"""Charts as files."""

import os
from typing import Any

from jaxmet.plot.drawing import version_of_vega_lite, vl_convert
from jaxmet.tree.writing import writable, written

SUFFIXES = (".html", ".png", ".svg", ".json")
SCALE = 2  # pixels of a PNG for one of the chart


def save(
    chart: Any, path: str | os.PathLike[str], *, scale: float | int = SCALE
) -> None:
    """Write a chart to a file of the kind that its name says: html, png, svg or json.

    The HTML opens without network: the scripts are inside. PNG (with `scale` pixels for one)
    and SVG need no browser. JSON is the Vega-Lite specification.

    Args:
        chart: a chart of `jm.plot`.
        path: the file; its suffix is html, png, svg or json.
        scale: pixels of a PNG per pixel of the chart; default 2.

    Raises:
        ValueError: for another suffix, for what is no chart, a folder that is not there and a
            path that is a folder.
        ImportError: without the extra.

    >>> jm.plot.save(jm.plot.noise(table), "noise.png")
    """
    path = writable(path, "plot.save")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"jaxmet.plot.save: {path.name!r} ends in {path.suffix or 'nothing'!r}. Let it "
            f"end in {', '.join(SUFFIXES)}."
        )
    if not hasattr(chart, "to_dict"):
        raise ValueError(
            f"jaxmet.plot.save: the chart is of type {type(chart).__name__}. Give what a "
            "function of jm.plot returned."
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise ValueError(
            f"jaxmet.plot.save: scale is {scale!r}. Give pixels for one of the chart, such "
            "as 2."
        )
    content = _rendered(chart, path.suffix.lower(), scale)
    written(path, lambda file: file.write(content))


def _rendered(chart: Any, suffix: str, scale: float | int) -> bytes:
    if suffix == ".json":
        return chart.to_json().encode()
    vl, spec = vl_convert("plot.save"), chart.to_dict()
    version = version_of_vega_lite("plot.save")
    if suffix == ".png":
        return vl.vegalite_to_png(spec, vl_version=version, scale=scale)
    if suffix == ".svg":
        return vl.vegalite_to_svg(spec, vl_version=version).encode()
    page = vl.vegalite_to_html(spec, vl_version=version, bundle=True, renderer="svg")
    return page.encode()

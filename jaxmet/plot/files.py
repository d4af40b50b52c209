"""Charts as files."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmet.plot.drawing import version_of_vega_lite, vl_convert

SUFFIXES = (".html", ".png", ".svg", ".json")
SCALE = 2  # pixels of a PNG for one of the chart


def save(
    chart: Any, path: str | os.PathLike[str], *, scale: float | int = SCALE
) -> None:
    """Write a chart to a file of the kind that its name says: html, png, svg or json.

    The HTML opens without network: the scripts are inside. PNG (with `scale` pixels for one)
    and SVG need no browser. JSON is the Vega-Lite specification.

    Raises ValueError for another suffix, for what is no chart, a folder that is not there and
    a path that is a folder; ImportError without the extra.

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
    written(path, _rendered(chart, path.suffix.lower(), scale))


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


def writable(path: str | os.PathLike[str], caller: str) -> Path:
    """The path, refused where nothing can be written under it."""
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise ValueError(
            f"jaxmet.{caller}: {path} is a folder. Give the name of a file."
        )
    if not folder.is_dir():
        raise ValueError(
            f"jaxmet.{caller}: there is no folder {folder}. Make it first: "
            "pathlib.Path(folder).mkdir(parents=True)."
        )
    attempt(
        folder / f".{path.name}.{uuid.uuid4().hex}.part", lambda p: p.touch(), caller
    )
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(
            f"jaxmet.{caller}: {path} is read-only. Give another name, or make it writable."
        )
    return path


def attempt(part: Path, make: Callable[[Path], Any], caller: str) -> None:
    """Try a file that is gone again afterwards."""
    try:
        make(part)
    except OSError as error:
        raise ValueError(
            f"jaxmet.{caller}: nothing can be written to the folder {part.parent} "
            f"({error.strerror}). Give a path that can be written."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def written(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is complete."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise

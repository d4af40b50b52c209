"""Paths that are checked before the work, and files that appear only when they are complete."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from jaxmet.tree.checks import shown


def writable(path: str | os.PathLike[str], caller: str) -> Path:
    """The path, refused where nothing can be written under it; a link is what it leads to."""
    path = _file(path, caller)
    path = path.resolve() if path.is_symlink() else path
    folder = path.parent
    if path.exists() and not path.is_file():  # a pipe or a device would be replaced
        raise ValueError(
            f"jaxmet.{caller}: {path} is no ordinary file. Give the name of one."
        )
    if not folder.is_dir():
        raise ValueError(
            f"jaxmet.{caller}: there is no folder {folder}. Make it first: "
            "pathlib.Path(folder).mkdir(parents=True)."
        )
    _attempt(_part(path), lambda p: p.touch(), caller)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(
            f"jaxmet.{caller}: {path} is read-only. Give another name, or make it writable."
        )
    return path


def check_free(path: Path, overwrite: bool, caller: str) -> None:
    """Refuse a path that exists, unless it may be replaced."""
    if path.exists() and not overwrite:
        raise ValueError(
            f"jaxmet.{caller}: there is a file {path} already. Give another name, or "
            "overwrite=True."
        )


def readable(path: Any, caller: str, writer: str = "jm.save") -> Path:
    """The path, refused unless there is a file under it."""
    path = _file(path, caller)
    if not path.exists():
        raise FileNotFoundError(
            f"jaxmet.{caller}: there is no file {path} (the working directory is "
            f"{Path.cwd()}). Give the path that {writer} wrote."
        )
    return path


def _file(path: Any, caller: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"jaxmet.{caller}: the path is {shown(path)}. Give the name of a file."
        )
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"jaxmet.{caller}: {path} is a folder. Give the name of a file."
        )
    return path


def _attempt(part: Path, make: Callable[[Path], Any], caller: str) -> None:
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


def written(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file that appears under its name only when it is complete."""
    part = _part(path)
    try:
        with open(part, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")

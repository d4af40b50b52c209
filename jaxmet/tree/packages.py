"""Packages that a few functions need: imported where they are used, refused in one wording."""

import importlib
from typing import Any


def package(name: str, caller: str, install: str) -> Any:
    """A package or a module of one, or what to install where it is missing.

    Args:
        name: what is imported.
        caller: the public function that needs it, for the error.
        install: what follows `pip install`.

    Returns:
        The module.

    Raises:
        ImportError: where it, or what it needs itself, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"jaxmet.{caller}: there is no package {error.name!r}. Install what it needs: "
            f"pip install {install}."
        ) from error

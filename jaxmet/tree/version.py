"""The version of the package, which pyproject.toml states."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]


def stated_version(root: Path) -> str:
    """The version that a checkout states, or else the metadata of what is installed.

    In this order, because a checkout on the path may hide an installed copy of another
    version.
    """
    file = root / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "jaxmet":
            return project["version"]
    try:
        return version("jaxmet")
    except PackageNotFoundError:  # a copy of the folder
        return "0+unknown"


__version__ = stated_version(ROOT)
"""The version of jaxmet, as a string."""

"""English sentences that every machine with Python has: documentation of what is installed.

Both sets are evenly spaced draws of all sentences of their sources, in a fixed order: the same
versions of Python and of the packages give the same sentences.
"""

import importlib
import inspect
import re
import warnings
from collections.abc import Iterable

CALIBRATION = 128
EVALUATION = 256
MODULES = """
    jax.lax jax.nn jax.numpy numpy numpy.fft numpy.linalg numpy.random scipy.fft
    scipy.integrate scipy.interpolate scipy.linalg scipy.ndimage scipy.optimize scipy.signal
    scipy.sparse scipy.spatial scipy.special scipy.stats
""".split()
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]*\.")


def calibration() -> list[str]:
    """Of the documentation of Python itself."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return evenly(sentences(topics[name] for name in sorted(topics)), CALIBRATION)


def evaluation() -> list[str]:
    """Of the documentation of NumPy, SciPy and JAX."""
    return evenly(sentences(docstrings(MODULES)), EVALUATION)


def docstrings(modules: Iterable[str]) -> list[str]:
    """Of all public functions and classes, module by module, by name."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names only say that they are deprecated
        for name in modules:
            module = importlib.import_module(name)
            for member in sorted(n for n in dir(module) if not n.startswith("_")):
                value = getattr(module, member, None)
                home = getattr(value, "__module__", None) or name
                if callable(value) and home.split(".")[0] in ("jax", "numpy", "scipy"):
                    found.append(inspect.getdoc(value) or "")
    return found


def sentences(texts: Iterable[str]) -> list[str]:
    """Sentences of 12 to 60 words in plain letters, each of them once."""
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            if "---" in paragraph:  # the heading of a section and what follows it
                continue
            for one in re.split(r"(?<=\.) (?=[A-Z])", line):
                if PLAIN.fullmatch(one) and 12 <= len(one.split()) <= 60:
                    found[one] = None
    return list(found)


def evenly(items: list[str], number: int) -> list[str]:
    """As many of the items, evenly spaced."""
    if len(items) < number:
        raise ValueError(f"{number} sentences are needed, and there are {len(items)}.")
    return [items[i * len(items) // number] for i in range(number)]

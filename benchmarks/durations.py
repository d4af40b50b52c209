"""Which everyday tests take longest?

    pytest -n 2 --junitxml=durations.xml
    python benchmarks/durations.py durations.xml > benchmarks/durations.md

A row is one test with its fixtures; a fixture of a module counts for the test that comes first.
Another argument is a remark about the run.
"""

import os
import platform
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from importlib.metadata import version

SHOWN = 50
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pytest", "pytest-xdist")


def page(suite: ET.Element, remarks: Sequence[str]) -> Iterator[str]:
    """The lines of a Markdown page about one run."""
    cases = [(float(c.get("time", 0)), c) for c in suite.iter("testcase")]
    cases.sort(key=lambda case: -case[0])
    total = sum(seconds for seconds, _ in cases)
    slowest = sum(seconds for seconds, _ in cases[:SHOWN])
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    yield "# Durations of the everyday tests\n"
    yield "    pytest -n 2 --junitxml=durations.xml"
    yield "    python benchmarks/durations.py durations.xml > benchmarks/durations.md\n"
    yield f"Python {platform.python_version()}, {versions}; {os.cpu_count()} CPU cores."
    yield (
        f"{len(cases)} tests took {float(suite.get('time', 0)):.0f} s; the times of all tests add "
        f"up to {total:.0f} s, and the slowest {SHOWN} of them to {slowest:.0f} s."
    )
    yield "\n".join([*remarks, ""])
    yield "| seconds | test |"
    yield "|---:|---|"
    for seconds, case in cases[:SHOWN]:
        *_, file = case.get("classname", "").split(".")
        name = case.get("name", "").replace("|", "\\|")
        yield f"| {seconds:.1f} | `{file}.py::{name}` |"


if __name__ == "__main__":
    (found,) = ET.parse(sys.argv[1]).getroot().iter("testsuite")
    print("\n".join(page(found, sys.argv[2:])))

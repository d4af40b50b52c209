"""Is jaxmet right on models that nobody here wrote?

    pip install '.[outside]'
    python benchmarks/outside.py --only 'keras*' --json found.json

Builds public models from the packages that are installed, at small widths and with random
parameters and statistics, and asks the same of each. Every model runs in a process of its own,
for a limited time. A cell of the table is a value, **bold** where it is wrong; every hole is
listed below with its reason, and so is every package that is missing.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")

ORDER = ("right", "wrong", "raised", "blocked", "n/a")


def run_here(name: str, cells: list[str], tell: Callable[[str], None]) -> None:
    """One model in this process: a line of JSON a cell."""
    from outside.battery import Cell, battery
    from outside.model import MODELS

    start = time.perf_counter()

    def told(cell: str, found: Cell) -> None:
        seconds = time.perf_counter() - start
        tell(json.dumps([cell, found.verdict, found.value, found.note, seconds]))

    try:
        battery(MODELS[name], cells, told)
    except Exception as error:
        told(
            "build", Cell("raised", "raised", f"{type(error).__name__}: {error}"[:500])
        )


def run_together(name: str, cells: list[str], seconds: float) -> dict[str, Any]:
    """One model in this process, which has compiled much of it for the model before."""
    lines: list[str] = []
    start = time.perf_counter()
    run_here(name, cells, lines.append)
    return row_of(name, cells, lines, "") | {"seconds": time.perf_counter() - start}


def run_apart(name: str, cells: list[str], seconds: float) -> dict[str, Any]:
    """One model in a process of its own, which ends with its time."""
    command = [sys.executable, __file__, "--here", name, "--cells", ",".join(cells)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
        over = "the process ended" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        over = f"no answer within {seconds:.0f} s"
    row = row_of(name, cells, text.splitlines(), over)
    return row | {"seconds": time.perf_counter() - start}


def row_of(name: str, cells: list[str], lines: list[str], over: str) -> dict[str, Any]:
    """What a model told, and of what it did not tell, why."""
    found = {}
    for line in lines:
        if line.startswith('["'):
            cell, verdict, value, note, at = json.loads(line)
            found[cell] = {"verdict": verdict, "value": value, "note": note, "at": at}
    row = {"model": name, "cells": found, "failed": ""}
    if "build" in found:
        row["failed"] = found.pop("build")["note"]
    for cell in cells:
        if cell not in found:
            found[cell] = {
                "verdict": "raised",
                "value": "raised",
                "note": over,
                "at": 0.0,
            }
            found[cell] |= (
                {"verdict": "blocked", "value": "blocked"} if not over else {}
            )
    return row


def table(rows: list[dict[str, Any]], cells: Sequence[str]) -> str:
    """The rows as Markdown, holes in bold, and what the holes are."""
    head = ["model", *cells, "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        shown = [_shown(row["cells"][c]) for c in cells]
        lines.append(
            f"| {' | '.join([row['model'], *shown, format(row['seconds'], '.0f')])} |"
        )
    every = collections.Counter(
        row["cells"][c]["verdict"] for row in rows for c in cells
    )
    asked = sum(every.values()) - every["n/a"]
    said = ", ".join(f"{every[v]} {v}" for v in ORDER)
    share = 100 * every["right"] / max(asked, 1)
    lines += [
        "",
        f"{len(rows)} models; cells: {said}. {share:.1f} % of those that apply are right.",
    ]
    return "\n".join(lines)


def holes(rows: list[dict[str, Any]], cells: Sequence[str]) -> str:
    """Every cell that is not right, by name."""
    lines = ["", "Holes:", ""]
    for row in rows:
        for cell in cells:
            found = row["cells"][cell]
            if found["verdict"] in ("wrong", "raised"):
                lines.append(
                    f"- {row['model']}, {cell}: {found['verdict']}: {found['note']}"
                )
    lines += ["", "Not applicable:", ""]
    reasons = collections.defaultdict(list)
    for row in rows:
        for cell in cells:
            found = row["cells"][cell]
            if found["verdict"] == "n/a":
                reasons[cell, found["note"]].append(row["model"])
    lines += [
        f"- {cell}: {why} ({', '.join(of)})"
        for (cell, why), of in sorted(reasons.items())
    ]
    return "\n".join(lines)


def _shown(cell: dict[str, Any]) -> str:
    value = cell["value"]
    return value if cell["verdict"] in ("right", "n/a") else f"**{value}**"


def read(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The cells that several runs found, model by model, and what none of them built."""
    rows: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for path in paths:
        found = json.loads(path.read_text())
        skipped |= found["skipped"]
        for row in found["rows"]:
            kept = rows.setdefault(row["model"], row | {"cells": {}, "seconds": 0.0})
            kept["cells"] |= row["cells"]
            kept["seconds"] += row["seconds"]
    return [*rows.values()], {n: why for n, why in skipped.items() if n not in rows}


def show(
    rows: list[dict[str, Any]], skipped: dict[str, str], cells: Sequence[str]
) -> None:
    """Print the table, its holes and what is not in it."""
    cells = [c for c in cells if all(c in row["cells"] for row in rows)]
    print(table(rows, cells))
    print(holes(rows, cells))
    if skipped:
        print(
            "\nNot built:\n", *(f"- {n}: {why}" for n, why in skipped.items()), sep="\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="*", help="globs of model names, separated by commas"
    )
    parser.add_argument("--cells", default="", help="cells to run, separated by commas")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument(
        "--seconds", type=float, default=300, help="time limit of a model"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="one process, no time limit, less to load",
    )
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument(
        "--read",
        type=Path,
        nargs="+",
        help="print what --json wrote in several runs, later ones over earlier ones",
    )
    arguments = parser.parse_args()
    from outside.battery import CELLS
    from outside.model import load_models

    cells = [c for c in CELLS if not arguments.cells or c in arguments.cells.split(",")]
    if arguments.here:
        load_models()
        run_here(arguments.here, cells, lambda line: print(line, flush=True))
        return
    if arguments.read:
        show(*read(arguments.read), cells)
        return
    models = load_models(arguments.only)
    run = run_together if arguments.together else run_apart
    rows, skipped = [], {}
    for model in models:
        if model.missing:
            skipped[model.name] = ", ".join(model.missing) + " not installed"
            continue
        rows.append(run(model.name, cells, arguments.seconds))
        if rows[-1]["failed"]:  # no fault of jaxmet's
            skipped[model.name] = rows.pop()["failed"]
            continue
        last = {
            c: f["verdict"]
            for c, f in rows[-1]["cells"].items()
            if f["verdict"] not in ("right", "n/a")
        }
        print(
            f"{model.name}: {rows[-1]['seconds']:.0f} s {last or ''}",
            file=sys.stderr,
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(
                json.dumps({"rows": rows, "skipped": skipped}, indent=1)
            )
    show(rows, skipped, cells)


if __name__ == "__main__":
    main()

"""Executes the notebooks, each from a clean kernel, and says how long it took.

    pip install '.[notebooks]'
    python notebooks/run.py                        # all of them; files stay as they are
    python notebooks/run.py --write 03_adaround.ipynb   # and keep what it printed and drew
    JAXMET_NOTEBOOK=full python notebooks/run.py   # with all images

Kept outputs hold nothing of the machine: progress bars, warnings (shown here instead), times
of execution, folders and the ids of objects are left out.
"""

import argparse
import base64
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGETS = "application/vnd.jupyter.widget-view+json"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def execute(path: Path, seconds: int = 120) -> Any:
    """The notebook of a file with its new outputs; raises CellExecutionError.

    The kernel is new and works in the notebook's folder. `seconds` bounds each cell.
    """
    notebook = nbformat.read(str(path), as_version=4)
    client = NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
    )
    return client.execute()


def cleaned(notebook: Any) -> Any:
    """Without what differs from machine to machine, in place."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [o for o in map(_cleaned, cell.outputs) if o is not None]
    nbformat.validate(notebook)
    return notebook


def _cleaned(output: Any) -> Any:
    if output.output_type == "stream":
        output.text = ADDRESS.sub("", output.text)
        return None if output.name == "stderr" else output
    bundle = output.get("data", {})
    if WIDGETS in bundle:
        return None
    if "text/plain" in bundle:
        bundle["text/plain"] = ADDRESS.sub("", bundle["text/plain"])
    if "image/png" in bundle:  # the text beside a picture is an object's name
        output.data = nbformat.from_dict({"image/png": _smaller(bundle["image/png"])})
        output.metadata = nbformat.from_dict({})
    return output


def _smaller(png: str) -> str:
    """The same picture in 256 colours: a tenth of the bytes."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    file = io.BytesIO()
    few.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _warnings(notebook: Any) -> str:
    outputs = [o for c in notebook.cells for o in c.get("outputs", ())]
    return "".join(o.text for o in outputs if o.get("name") == "stderr")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", help="files; default all")
    parser.add_argument("--write", action="store_true", help="keep the outputs")
    parser.add_argument("--into", type=Path, help="a folder for copies with outputs")
    parser.add_argument("--seconds", type=int, default=600, help="of a cell, at most")
    options = parser.parse_args()
    names = [Path(name).name for name in options.notebooks]
    for path in [HERE / n for n in names] or sorted(HERE.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = execute(path, options.seconds)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
        lines = [x for x in _warnings(notebook).splitlines() if "%|" not in x and x]
        print("\n".join(lines), end="\n" if lines else "", file=sys.stderr)
        for folder in [HERE] * options.write + [options.into] * bool(options.into):
            nbformat.write(cleaned(notebook), str(folder / path.name))


if __name__ == "__main__":
    main()

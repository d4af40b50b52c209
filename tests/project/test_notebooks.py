"""The notebooks: what is kept in the files holds, and they run from clean kernels."""

import ast
import base64
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from PIL import Image

import jaxmet as jm

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = (
    "01_quick_tour",
    "02_data_free_quantization",
    "03_adaround",
    "04_training",
    "05_compression",
    "06_see_inside",
    "07_int8_file",
)
# For each notebook: how many pictures it draws, and which network is right more often than
# which other one.
PICTURES = dict(zip(NAMES, (1, 4, 3, 2, 2, 5, 1), strict=True))
BETTER = {
    "01_quick_tour": [
        ("8 bits, fold + equalize + correct", "8 bits, fold"),
        ("4 bits, correct", "4 bits, nearest"),
    ],
    "02_data_free_quantization": [
        ("8 bits, equalized", "8 bits, folded"),
        ("8 bits, equalized, corrected", "8 bits, folded"),
    ],
    "03_adaround": [("4 bits, adaround", "4 bits, nearest")],
    "04_training": [("4 bits, trained", "4 bits, calibrated")],
    "05_compression": [
        ("half of each, SVD, fine-tuned", "half of each, SVD"),
        ("ratios chosen, pruned", "half of each, SVD"),
    ],
    "06_see_inside": [
        ("4 bits", "4 bits, one grid wrong"),
        ("4 bits, five weights with 8", "4 bits"),
    ],
    "07_int8_file": [("int8 file", "int4 file"), ("int8 in JAX", "int4 file")],
}
EXTRAS = dict.fromkeys(NAMES, "plot") | {"07_int8_file": "plot,onnx"}
MACHINE = re.compile(
    r"/(?:work|tmp|home|root|usr|opt|mnt|Users|content)/|site-packages|Traceback"
    r"|0x[0-9a-f]{6}|\d+(?:\.\d+)?s/it|it/s"
)


def read(name, folder=FOLDER):
    return json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(notebook):
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def parsed(cell):
    lines = source(cell).splitlines()
    return ast.parse("\n".join(re.sub(r"^(\s*)%.*", r"\1pass", x) for x in lines))


def draws(cell):
    """Whether the last line of a cell is a chart: what is evaluated, not assigned."""
    last = parsed(cell).body[-1]
    text = ast.unparse(last)
    charts = ("jm.plot.", "alt.Chart(", "mark_")
    return isinstance(last, ast.Expr) and any(chart in text for chart in charts)


def pictures(cell):
    bundles = [output.get("data", {}) for output in cell["outputs"]]
    return ["".join(b["image/png"]) for b in bundles if "image/png" in b]


def text_of(cell):
    parts = [
        o.get("text") or o.get("data", {}).get("text/plain", "")
        for o in cell["outputs"]
    ]
    return "\n".join("".join(part) for part in parts)


def accuracies(notebook):
    """What the tables of a notebook say of each network, in percent."""
    row = re.compile(r"^(\S.*?) {2,}(\d+\.\d+) ± \d+\.\d+ ", re.MULTILINE)
    text = "\n".join(map(text_of, code_cells(notebook)))
    return {name: float(value) for name, value in row.findall(text)}


def check_outputs(name, notebook, slack=0.0):
    """What a notebook shows: pictures with something in them, and tables as promised."""
    shown = [c for c in code_cells(notebook) if draws(c)]
    assert len(shown) == PICTURES[name]
    for cell in shown:
        [png] = pictures(cell)
        with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
            assert min(picture.size) >= 100
            counts = picture.convert("L").getcolors()
        assert len(counts) > 8 and max(n for n, _ in counts) < 0.99 * sum(
            n for n, _ in counts
        )
    found = accuracies(notebook)
    assert 88 < found["float"] < 97
    for more, less in BETTER[name]:
        assert found[more] > found[less] - slack, (more, less)


def test_there_are_seven_notebooks_and_nothing_is_left_of_a_run():
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    kinds = {p.suffix for p in FOLDER.iterdir() if p.is_file()}
    assert kinds == {".ipynb", ".py"}


@pytest.mark.parametrize("name", NAMES)
def test_kept_outputs_are_those_of_one_run_of_a_clean_kernel(name):
    notebook = read(name)
    cells = code_cells(notebook)
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    check_outputs(name, notebook)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_machine_is_kept_and_files_are_small(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000
    notebook = read(name)
    for cell in code_cells(notebook):
        assert cell["metadata"] == {}
        for output in cell["outputs"]:
            output.get("data", {}).pop("image/png", None)
            assert not MACHINE.search(json.dumps(output, ensure_ascii=False))
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_each_begins_alike_and_goes_on_in_short_cells(name):
    notebook = read(name)
    cells, codes = notebook["cells"], code_cells(notebook)
    assert notebook["nbformat"] == 4 and len({c["id"] for c in cells}) == len(cells)
    assert source(cells[0]).startswith(f"# {int(name[:2])}. ")
    install, setup = source(codes[0]), source(codes[1])
    address = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text("utf-8"))
    source_url = address["project"]["urls"]["Source"]
    assert install == (
        "try:\n    import jaxmet as jm\nexcept ImportError:\n"
        f'    %pip install --quiet "jaxmet[{EXTRAS[name]}] @ git+{source_url}"\n'
        "    import jaxmet as jm"
    )
    assert "JAXMET_NOTEBOOK" in setup and "jax.devices()" in setup
    assert "Device" in text_of(codes[1])
    for cell in cells:
        assert len(source(cell).splitlines()) <= 15, source(cell)


@pytest.mark.parametrize("name", NAMES)
def test_linen_comes_first_and_nnx_is_beside_it(name):
    text = "\n".join(source(c) for c in read(name)["cells"])
    linen, nnx = (
        text.find("jm.trace(model.apply, variables"),
        text.find("jm.functional("),
    )
    assert 0 <= linen < nnx
    assert "jm.trace(apply, " in text[nnx:]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_library_is_there_and_links_lead_somewhere(name):
    cells = read(name)["cells"]
    text = "\n".join(map(source, cells))
    assert len(set(re.findall(r"\bjm\.(\w+)", text))) >= 8
    missing = [n for n in re.findall(r"\bjm\.(\w+)", text) if not hasattr(jm, n)]
    missing += [
        n for n in re.findall(r"\bjm\.plot\.(\w+)", text) if not hasattr(jm.plot, n)
    ]
    assert not missing
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (FOLDER / target).exists(), target
    for target in re.findall(r"`((?:docs|benchmarks)/[\w./-]+)`", text):
        assert (FOLDER.parent / target).exists(), target


def test_text_quotes_no_results():
    """Figures are left to the outputs, which say what was measured in that run."""
    for name in NAMES:
        for cell in read(name)["cells"]:
            if cell["cell_type"] == "markdown":
                assert not re.search(r"\d\.\d+ ?(?:%|dB|points)", source(cell))


def test_the_analyser_puts_the_wrong_grid_first():
    cells = code_cells(read("06_see_inside"))
    tables = [text_of(c).splitlines() for c in cells if "own share" in text_of(c)]
    assert tables[0][2].startswith("block4/project_bn ")
    [found] = re.findall(r"rank correlation (\d\.\d+)", "\n".join(map(text_of, cells)))
    assert float(found) > 0.9


def test_layers_of_the_file_compute_what_is_simulated():
    text = "\n".join(map(text_of, code_cells(read("07_int8_file"))))
    rows = re.findall(r"^(\S+) +(\d+) +[\d.]+ +(\d+) +(\d+) +\d", text, re.MULTILINE)
    layers = [row for row in rows if row[0] != "output"]
    assert len(layers) == 23 and "22 of 22 operations in integers" in text
    assert all(
        int(far) == 0 and int(n) < 1e-5 * int(of) + 2 for _, of, n, far in layers
    )


def test_adaround_wins_in_every_layer():
    rows = [
        [float(v) for v in re.findall(r" {2,}(\d+\.?\d*)", line)]
        for cell in code_cells(read("03_adaround"))
        for line in text_of(cell).splitlines()
        if "nearest loss" in text_of(cell) and line.endswith("–")
    ]
    assert len(rows) == 18 and all(r[0] < r[1] and r[3] < 1 for r in rows)


def test_cells_without_a_picture_are_seen():
    """The checks above are worth something: an empty or missing picture fails them."""
    notebook = read("02_data_free_quantization")
    cell = next(c for c in code_cells(notebook) if draws(c))
    kept = cell["outputs"]
    cell["outputs"] = []
    with pytest.raises(ValueError):
        check_outputs("02_data_free_quantization", notebook)
    file = io.BytesIO()
    Image.new("RGB", (400, 300), "white").save(file, "png")
    kept[0]["data"]["image/png"] = base64.b64encode(file.getvalue()).decode()
    cell["outputs"] = kept
    with pytest.raises(AssertionError):
        check_outputs("02_data_free_quantization", notebook)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_clean_kernel(name, tmp_path, monkeypatch):
    needed = ["nbclient", "nbformat", "ipykernel", "altair", "vl_convert"]
    needed += ["jax2onnx", "onnxruntime"] if "onnx" in EXTRAS[name] else []
    missing = [n for n in needed if importlib.util.find_spec(n) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: pip install '.[notebooks]'")
    for variable in ("JAXMET_NOTEBOOK", "JAXMET_PICTURES", "XLA_FLAGS"):
        monkeypatch.delenv(variable, raising=False)  # one device, as users have
    if kept := jax.config.jax_compilation_cache_dir:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", kept)
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = [sys.executable, "notebooks/run.py", "--seconds", "120"]
    done = subprocess.run(
        [*command, "--into", str(tmp_path), f"{name}.ipynb"],
        cwd=FOLDER.parent,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_outputs(name, read(name, tmp_path), slack=0.5)
    before, after = (
        list(map(source, n["cells"])) for n in (read(name), read(name, tmp_path))
    )
    assert before == after

"""What the README and the pages print runs as printed, and names every public name."""

import ast
import contextlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmet.export.runtimes import has_vnni

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")


class Block(NamedTuple):
    code: str
    tab: str | None


def blocks_of(text: str) -> list[Block]:
    """The Python blocks of a page, with the name of the tab that each stands in."""
    found, tab, fence, code = [], None, None, []
    for line in text.splitlines():
        begin = re.fullmatch(r"( *)```python", line)
        if fence is not None and line == f"{fence}```":
            found.append(Block("\n".join(code) + "\n", tab if fence else None))
            fence = None
        elif fence is not None:
            assert line.startswith(fence) or not line.strip(), line
            code.append(line[len(fence) :])
        elif begin:
            fence, code = begin[1], []
        elif opened := re.fullmatch(r'=== "(\w+)"', line):
            tab = opened[1]
    assert fence is None
    return found


def run(page: Path, scope: dict, tab: str | None = None) -> dict:
    """Run a page's blocks in order, those of other tabs left out, all tabs by default."""
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    for at, block in enumerate(blocks):
        if None in (tab, block.tab) or tab == block.tab:
            exec(compile(block.code, f"{page.name}, block {at}", "exec"), scope)
    return scope


def test_blocks_and_their_tabs_are_found():
    text = (
        '```python\na\n```\n=== "linen"\n\n    ```python\n    b\n\n    c\n    ```\n'
        '\n=== "nnx"\n\n    ```python\n    d\n    ```\n\n```bash\ne\n```\n```python\nf\n```\n'
    )
    found = [("a\n", None), ("b\n\nc\n", "linen"), ("d\n", "nnx"), ("f\n", None)]
    assert blocks_of(text) == [Block(*pair) for pair in found]


def test_arguments_of_a_docstring_become_a_list():
    pytest.importorskip("griffe", reason="the site needs pip install '.[docs]'")
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (
        "Does it.\n\nArgs:\n    x: an array, of\n        any shape.\n    **kwargs: more.\n"
        "\nReturns:\n    Twice: the same.\n\nRaises:\n    ValueError: never.\n\n>>> f(1)\n"
    )
    expected = (
        "Does it. **Args:** - `x`: an array, of any shape. - `**kwargs`: more. "
        "**Returns:** Twice: the same. **Raises:** - `ValueError`: never. "
        "```pycon >>> f(1) ```"
    )
    assert " ".join(module.as_markdown(text).split()) == expected


class Small(nn.Module):
    """A network with everything that the examples name."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True, name="stem_bn")(x))
        x = nn.Conv(8, (3, 3), name="expand")(x)
        return nn.Dense(4, name="head")(jnp.mean(nn.relu(x), (1, 2)))


class SmallTwin(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.expand = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu6(self.stem_bn(self.stem(x)))
        return self.head(jnp.mean(nnx.relu(self.expand(x)), (1, 2)))


def scope_of(tab: str) -> dict:
    """What a page may assume, with the outputs of the float model."""
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    scope = {"images": images, "labels": jnp.arange(16) % 4}
    if tab == "nnx":
        model = SmallTwin(nnx.Rngs(0))
        return scope | {"model": model, "expected": model(images)}
    model = Small()
    variables = model.init(jax.random.key(1), images)
    expected = model.apply(variables, images)
    return scope | {"model": model, "variables": variables, "expected": expected}


def relative_error(scope: dict) -> float:
    error = scope["logits"] - scope["expected"]
    return float(jnp.mean(error**2) / jnp.mean(scope["expected"] ** 2))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: every file by its name."""
    for package in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason="the site needs pip install '.[docs]'")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["-f", ROOT / ".mkdocs.yml", "-d", target]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(p.relative_to(target)): p for p in target.rglob("*.html")}


@pytest.mark.slow
def test_site_builds_strictly_with_every_page_and_name(site):
    pages = {str(p.relative_to(DOCS).with_suffix(".html")) for p in DOCS.rglob("*.md")}
    assert pages <= set(site) and "benchmarks.html" in site
    anchors = set()
    for name, page in site.items():
        text = page.read_text(encoding="utf-8")
        anchors |= set(re.findall(r'<h\d id="(jaxmet[\w.]*)"', text))
        prose = re.sub(r"<(script|pre|code)\b.*?</\1>|<[^>]*>", "", text, flags=re.S)
        assert not re.search(r"&gt;&gt;&gt;|\$\S[^$]*\$|\\[(\[]", prose), name
    assert public_names() <= anchors


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site):
    loads = r'<(?:script|img|iframe|link)\b[^>]*(?:src|href)="((?:https?:)?//[^"]*)"'
    for name, page in site.items():
        assert not re.findall(loads, page.read_text(encoding="utf-8")), name


# What a page's last logits are off the float model, as a share of their energy.
LEAST, MOST = 1e-7, 0.05
SHARED = {
    "index": (LEAST, MOST),
    "model": (0.0, 1e-9),  # the model itself
    "prepare": (LEAST, MOST),
    "quantize": (
        LEAST,
        0.5,
    ),  # of 4-bit weights rounded to nearest, and ranges predicted
    "rounding": (LEAST, 0.2),
    "files": (LEAST, 0.9),  # half of a layer of random weights is gone
    "troubleshooting": (LEAST, MOST),
    "from-qwix": (LEAST, 0.5),
}
RUN_APART = {
    *("compression", "deploy", "inside", "integers", "litert", "new-transform"),
    *("openvino", "training", "transformers"),
}
OWN_MODEL = {  # integers: tests/export/test_integers_file.py
    *("integers", "new-transform", "training", "transformers"),
}


def test_every_page_with_code_is_run():
    having = {p.stem for p in PAGES if blocks_of(p.read_text(encoding="utf-8"))}
    assert having == {*SHARED, *RUN_APART}


# After the line that makes the model a function both tabs are the same code, so these
# pages run with either and the others with the first: their second is checked above.
BOTH = ("index", "quantize", "files")


@pytest.mark.parametrize("name", sorted({*SHARED, *RUN_APART} - OWN_MODEL))
def test_the_nnx_tab_is_the_same_model_as_a_function(name):
    scope = scope_of("nnx")
    blocks = blocks_of((DOCS / f"{name}.md").read_text(encoding="utf-8"))
    first = next(block for block in blocks if block.tab == "nnx")
    exec(first.code, scope)
    found = scope["apply"](scope["params"], scope["images"])
    assert jnp.allclose(found, scope["expected"], atol=1e-5)
    assert jnp.array_equal(scope["merge"](scope["params"])(scope["images"]), found)
    assert name in BOTH or sum(block.tab == "nnx" for block in blocks) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, tab",
    [(n, "linen") for n in SHARED] + [(n, "nnx") for n in BOTH],
)
def test_page_runs_as_printed(name, tab, folder):
    scope = run(DOCS / f"{name}.md", scope_of(tab), tab)
    least, most = SHARED[name]
    assert least <= relative_error(scope) <= most


@pytest.mark.slow
def test_inside_runs_as_printed(folder):
    for package in ("altair", "vl_convert"):
        pytest.importorskip(package, reason="pictures need pip install '.[plot]'")
    scope = run(DOCS / "inside.md", scope_of("linen"), "linen")
    grids = len(scope["quantizers"].weights) + len(scope["quantizers"].activations)
    assert len(scope["layers"]) == grids + 3 and len(scope["noise"]) == grids + 1
    assert scope["rows"][-1]["tensor"] == "(all)" == scope["again"]["tensor"][-1]
    assert set(scope["alone"]["kind"]) == {"weight"}
    written = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert min(written[name] for name in (*scope["folder"], "report.html")) > 5000


@pytest.mark.slow
def test_compression_runs_as_printed(folder):
    with jax.numpy_dtype_promotion("standard"):
        scope = run(DOCS / "compression.md", scope_of("linen"), "linen")
    macs = [scope[name]["macs"][-1] for name in ("before", "after")]
    assert macs[1] < 0.7 * macs[0] and scope["logits"].shape == (16, 4)
    assert (folder / "tiny.npz").exists()


@pytest.mark.slow
def test_transformers_runs_as_printed():
    scope = run(DOCS / "transformers.md", {})
    assert 1e-6 < relative_error(scope) < 0.2  # weights of 4 bits, drawn at random
    (table,) = (
        scope["jm"].plan(scope["params"], scope["graph"], config)
        for config in [scope["jm"].QuantConfig()]
    )
    notes = dict(zip(table["name"], table["note"], strict=True))
    assert notes["block0/down/add"].startswith("a residual stream")


@pytest.mark.slow
def test_new_transform_runs_as_printed():
    scope = run(DOCS / "new-transform.md", {})
    model, tokens, smooth = (scope[name] for name in ("model", "tokens", "smooth"))
    found = model.apply(scope["smoothed"], tokens)
    assert jnp.allclose(found, scope["expected"], atol=1e-5)
    assert scope["ratios"]["after"] > scope["ratios"]["before"] + 10
    gains = scope["smoothed"]["params"]["second"]["scale"]
    assert gains.max() < 10 * gains.min()
    graph = scope["graph"].only("norm")
    with pytest.raises(ValueError, match="norm 'norm' cannot be smoothed: query: not"):
        smooth(scope["params"], graph, scope["batches"], progress=False)


@pytest.mark.slow
def test_deploy_runs_as_printed(folder):
    for package in ("jax2onnx", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason="files need pip install '.[onnx]'")
    scope = run(DOCS / "deploy.md", scope_of("linen"), "linen")
    far = jnp.abs(scope["logits"] - scope["simulated"]).max()
    assert far < 0.05 * jnp.abs(scope["simulated"]).max()
    assert (folder / "integers.npz").exists()


@pytest.mark.slow
def test_litert_runs_as_printed(folder):
    for package in ("litert_converter", "ai_edge_litert"):
        pytest.importorskip(package, reason="files need pip install '.[litert]'")
    scope = run(DOCS / "litert.md", scope_of("linen"), "linen")
    (output,) = scope["outputs"].values()
    assert output.dtype == jnp.int8 and output.shape == (1, 4)
    assert (folder / "model.tflite").exists()


@pytest.mark.slow
def test_openvino_runs_as_printed(folder, monkeypatch):
    # With it the import forks a process to send statistics, of which JAX warns.
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    for package in ("jax2onnx", "onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="pip install '.[onnx,openvino]'")
    warned = pytest.warns(UserWarning, match="VNNI")  # its 8 bits are wrong without
    with contextlib.nullcontext() if has_vnni() else warned:
        scope = run(DOCS / "openvino.md", scope_of("linen"), "linen")
    step = float([*scope["quantizers"].activations.values()][-1].scale)
    apart = jnp.round(jnp.abs(scope["logits"] - scope["simulated"]) / step)
    assert not has_vnni() or (apart.max() <= 1 and jnp.mean(apart == 0) > 0.9)
    assert "in openvino" in scope["table"].title


class Trained(nn.Module):
    """What the page on training trains."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu6(nn.BatchNorm(not train, name="stem_bn")(x))
        return nn.Dense(4, name="head")(jnp.mean(x, (1, 2)))


class TrainedTwin(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu6(self.stem_bn(self.stem(x)))
        return self.head(jnp.mean(x, (1, 2)))


@pytest.mark.slow
def test_training_runs_as_printed(folder):
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    model, twin = Trained(), TrainedTwin(nnx.Rngs(0))
    variables = model.init(jax.random.key(1), images)
    scope = {"model": model, "variables": variables, "images": images}
    scope |= {"nnx_model": twin, "labels": jnp.arange(16) % 4}
    mean = jnp.copy(twin.stem_bn.mean[...])
    with jax.numpy_dtype_promotion("standard"):
        run(DOCS / "training.md", scope)
    before, after = variables["params"], scope["params"]
    assert jnp.any(before["stem"]["kernel"] != after["stem"]["kernel"])
    assert jnp.any(twin.stem_bn.mean[...] != mean) and jnp.isfinite(scope["value"])
    restored = jax.tree.leaves(scope["saved"].params["state"])
    assert len(restored) == len(jax.tree.leaves(scope["state"]))


@pytest.mark.slow
def test_readme_runs_as_printed(folder):
    scope = scope_of("linen") | {"nnx_model": SmallTwin(nnx.Rngs(0))}
    scope["params"] = scope["variables"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in blocks_of(readme):
        if "nnx_model" in block.code:
            nested = dict(scope)
            exec(block.code, nested)
            assert nested["merge"](nested["params"])(scope["images"]).shape == (16, 4)
        else:
            exec(block.code, scope)
    assert LEAST < relative_error(scope) < MOST
    [printed] = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    rows = re.findall(r"^(\w+(?: \w+)*) +(\d+\.\d+)  ", printed, re.MULTILINE)
    steps = {row["step"]: row["SQNR (dB)"] for row in scope["table"]}
    assert [name for name, _ in rows] == list(steps)
    # Up to what another processor may round otherwise.
    assert all(abs(steps[name] - float(ratio)) < 1.5 for name, ratio in rows)


def public_names() -> set[str]:
    """What jaxmet, its plot, export and numerics say or define in public."""
    found = set()
    for package in ("jaxmet", "jaxmet.plot", "jaxmet.export"):
        source = ROOT.joinpath(*package.split("."), "__init__.py").read_text("utf-8")
        stated = re.findall(r"^from .* import \w+ as (\w+)$", source, re.MULTILINE)
        found |= {f"{package}.{name}" for name in stated}
    assert len(found) > 50
    for path in sorted((ROOT / "jaxmet" / "numerics").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        body = ast.parse(path.read_text(encoding="utf-8")).body
        defined = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        found |= {f"{module}.{n.name}" for n in defined if n.name[0] != "_"}
    return found - {
        "jaxmet.numerics",
        "jaxmet.plot",
        "jaxmet.export",
    }  # pages of their own


def test_every_public_name_is_in_the_reference_and_the_guide():
    reference = "".join(p.read_text("utf-8") for p in DOCS.glob("reference/*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    names = {n for n in public_names() if not n.startswith("jaxmet.numerics.")}
    assert names == listed - {"jaxmet.numerics"}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    short = {n.replace("jaxmet.", "jm.") for n in names if ".plot." not in n}
    assert {n for n in short if not re.search(rf"\b{n}\b", text)} == set()


def messages() -> str:
    """All texts of the library, with a blank for what is filled in."""
    found = []
    for path in sorted((ROOT / "jaxmet").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(p, "value", None) for p in node.values]
                found.append("".join(p if isinstance(p, str) else " " for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_quoted_messages_are_those_of_the_library():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    first = re.findall(r"^\| (`.*) \|.*\|.*\|$", text, re.MULTILINE)
    known, strange = messages(), []
    quoted = [q for cell in first for q in re.findall(r"`([^`]+)`", cell) if " " in q]
    assert len(quoted) > 25
    for quote in quoted:
        pieces = re.split(r"…|jaxmet\.\w+: |Compressed: ", quote)
        strange += [p for p in pieces if p.strip(" .,") and p.strip(" .,") not in known]
    assert not strange


def test_figures_are_those_of_the_benchmarks():
    known = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    known = set(re.findall(r"\d+(?:[.,]\d+)?", known))
    text = (DOCS / "choose.md").read_text(encoding="utf-8")
    figures = re.findall(r"\d+(?:[.,]\d+)?", re.sub(r"`[^`]*`", "", text))
    assert len(figures) > 200
    assert sorted(set(figures) - known) == []


def test_links_lead_somewhere():
    pages = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pages.append(ROOT / "benchmarks" / "README.md")
    links = [(p, to) for p in pages for to in LINK.findall(p.read_text("utf-8"))]
    assert len(links) > 30
    assert not [(p.name, to) for p, to in links if not (p.parent / to).exists()]

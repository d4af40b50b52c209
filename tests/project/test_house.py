"""The rules of the house: who may import whom, and what a bare import may load."""

import ast
import importlib
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from jaxmet.numerics.lasso import lasso

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxmet"

# A file may import what stands on its own floor or below. The public list stands above
# all floors but the demo, which alone is written as a user would write it.
FLOORS = {
    "numerics": 0,
    "tree": 1,
    "engine": 2,
    "layers": 3,
    "transforms": 4,
    "analysis": 5,
    "plot": 6,
    "export": 6,
    "": 7,
    "demo": 8,
    "__main__": 9,
}
FAKE_QUANT = "numerics/fake_quant.py"  # defines the package's one primitive
JAXPR_MODULES = ("jax.extend", "jax.interpreters")
JAXPR_NAMES = re.compile(r"jaxpr|^(eqns?|invars|outvars|constvars|Primitive)$", re.I)
OPTIONAL = """
    IPython PIL ai_edge_litert altair beartype chex equinox haiku hypothesis ipywidgets
    litert_converter matplotlib onnx onnxruntime orbax pandas pytest scipy sklearn
    tensorflow torch torchvision typeguard vl_convert
""".split()
TOP_LEVEL = """
    CHANGELOG.md CONTRIBUTING.md LICENSE README.md benchmarks docs jaxmet notebooks
    pyproject.toml tests
""".split()


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Everything a file imports, absolute and dotted, with the line.

    `from a import b` gives `a.b`: whether b is a module is not known to the parser, and
    for a test of prefixes it does not matter.
    """
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *((node.module,) if node.module else ())))
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def spoken(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name in a file's code, strings and comments left out, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg, node.lineno
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2], node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node.lineno


def under(name: str, *modules: str) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def floor_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if first == "__init__" else first


def floor_named(name: str) -> str:
    """The floor that an absolute import of `jaxmet…` reaches."""
    part = (name.split(".") + [""])[1]
    return part if part in FLOORS else ""


def sources(*folders: Path) -> list[tuple[Path, ast.AST]]:
    files = sorted(f for folder in folders for f in folder.rglob("*.py"))
    return [(f, ast.parse(f.read_text("utf-8"), str(f))) for f in files]


LIBRARY = sources(PACKAGE)


def test_every_file_stands_on_a_floor() -> None:
    assert LIBRARY
    stray = [str(f) for f, _ in LIBRARY if floor_of(f) not in FLOORS]
    assert not stray, "jaxmet/ has the floors of FLOORS and nothing beside them"


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path, tree in LIBRARY
        for name, line in imported(path, tree)
        if under(name, "jaxmet")
        and FLOORS[floor_named(name)] > FLOORS.get(floor_of(path), -1)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("floor", "line", "reaches"),
    [
        ("numerics", "from ..tree import names", "tree"),
        ("tree", "import jaxmet.engine.graph.graph", "engine"),
        ("engine", "from jaxmet import analysis", "analysis"),
        ("transforms", "from .. import plot", "plot"),
        ("transforms", "def f():\n    from jaxmet import trace", ""),
        ("export", "if TYPE_CHECKING:\n    from ..demo.data import load", "demo"),
    ],
)
def test_imports_that_point_up_are_seen(floor: str, line: str, reaches: str) -> None:
    path = PACKAGE / floor / "example.py"
    [(name, _)] = imported(path, ast.parse(line))
    assert under(name, "jaxmet") and floor_named(name) == reaches
    assert FLOORS[floor_named(name)] > FLOORS[floor_of(path)]


def test_only_the_engine_knows_jaxprs() -> None:
    wrong = []
    for path, tree in LIBRARY:
        file = path.relative_to(PACKAGE).as_posix()
        if floor_of(path) == "engine" or file == FAKE_QUANT:
            continue
        wrong += [
            f"{file}:{line} imports {name}"
            for name, line in imported(path, tree)
            if under(name, *JAXPR_MODULES)
        ]
        wrong += [
            f"{file}:{line} mentions {name}"
            for name, line in spoken(tree)
            if JAXPR_NAMES.search(name)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["flax", "equinox"])
def test_one_folder_of_the_engine_knows_front_ends(package: str) -> None:
    """The demo's network is a user's model, so it is written in flax like one."""
    files = {
        path.relative_to(PACKAGE).as_posix()
        for path, tree in LIBRARY
        for name, _ in imported(path, tree)
        if under(name, package) and floor_of(path) != "demo"
    }
    own = {"flax": {"engine/frontends/nnx.py"}}
    assert files <= own.get(package, set())  # equinox is looked up where it is loaded


ENGINE = PACKAGE / "engine"
ENGINE_ORDER = "program axes backend integers nodes flow pruned graph run".split()
MAP_LINE = re.compile(r"^ *([a-z_]+/?)(?:  +\S|$)")  # a long name stands alone


def engine_imports() -> Iterator[tuple[str, str, str]]:
    """The folder of each file of the engine, the folder that it imports from, and both."""
    for path, tree in sources(ENGINE):
        own = path.relative_to(ENGINE).parts[0]
        for name, line in imported(path, tree):
            if under(name, "jaxmet.engine") and name.count(".") > 1:
                what = f"{path.relative_to(ROOT)}:{line} imports {name}"
                yield own, name.split(".")[2], what


def test_the_engine_points_down() -> None:
    """Each folder imports from those before it; front-ends import no other folder."""
    rank = {folder: i for i, folder in enumerate(ENGINE_ORDER)}
    folders = {f.name for f in ENGINE.iterdir() if (f / "__init__.py").exists()}
    assert folders == {*ENGINE_ORDER, "frontends"}
    found = list(engine_imports())
    assert {own for own, _, _ in found} >= folders - {"frontends", "program"}
    wrong = [
        what
        for own, reached, what in found
        if (own == "frontends" and reached != "frontends")
        or (reached in rank and rank[reached] > rank.get(own, len(rank)))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "folder",
    sorted(f.parent for f in PACKAGE.rglob("*/__init__.py")),
    ids=lambda folder: folder.relative_to(PACKAGE).as_posix(),
)
def test_the_docstring_of_a_folder_is_its_map(folder: Path) -> None:
    """One line for each file and folder in it, and for nothing else.

    A new transform is one file of `numerics` and one of `transforms`: their maps may lack it.
    """
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    found = [m[1] for line in (text or "").splitlines() if (m := MAP_LINE.match(line))]
    files = {f.stem for f in folder.glob("*.py")} - {"__init__"}
    folders = {f"{f.parent.name}/" for f in folder.glob("*/__init__.py")}
    assert len(found) == len({*found}) and {*found} <= files | folders
    if folder.relative_to(PACKAGE).as_posix() not in ("numerics", "transforms"):
        assert {*found} == files | folders


def test_names_occur_once_in_the_package() -> None:
    """A file's name and a class's name: who looks for one finds one."""
    names: dict[str, list[str]] = {}
    for path, tree in LIBRARY:
        file = path.relative_to(PACKAGE).as_posix()
        if path.name != "__init__.py":
            names.setdefault(path.name, []).append(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(file)
    assert not {name: files for name, files in names.items() if len(files) > 1}


def test_jax_private_modules_are_never_used() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in LIBRARY + sources(ROOT / "tests", ROOT / "benchmarks")
        for name, line in [*imported(path, tree), *spoken(tree)]
        if "_src" in name.split(".")
    ]
    assert not wrong, "\n".join(wrong)


def test_import_loads_no_optional_package(tmp_path: Path) -> None:
    jaxmet = importlib.import_module("jaxmet")
    assert jaxmet.__file__, "jaxmet/__init__.py is missing"
    path = str(Path(jaxmet.__file__).parents[1])
    ours = loaded("jaxmet", tmp_path, path)
    core = "jax, flax.linen, flax.nnx, optax, jaxtyping, tqdm.auto"
    assert ours <= loaded(core, tmp_path, path)  # what those load is not our doing


def loaded(modules: str, folder: Path, path: str) -> set[str]:
    """The optional packages that a fresh interpreter loads with `modules`."""
    code = f"import sys, {modules}; print(*sys.modules.keys() & set({OPTIONAL}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """What a module offers, `X as X` or in `__all__`, and what its modules offer."""
    tree = ast.parse(Path(module.__file__ or "").read_text("utf-8"))
    names = list(getattr(module, "__all__", ()))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names += [a.asname for a in node.names if a.asname == a.name]
    for name in dict.fromkeys(names):
        value = getattr(module, name)
        yield f"{module.__name__}.{name}", value
        if isinstance(value, ModuleType):
            yield from public(value)


def documented(value: object) -> bool:
    """Whether somebody wrote a docstring: what Python makes up itself is none."""
    if isinstance(value, (str, int, float, tuple)):  # __version__ and the like
        return True
    own = vars(value) if isinstance(value, type) else {"__doc__": value.__doc__}
    text = (own.get("__doc__") or "").strip()
    return bool(text) and not text.startswith(f"{getattr(value, '__name__', '')}(")


def test_every_public_name_has_a_docstring() -> None:
    jaxmet = importlib.import_module("jaxmet")
    assert jaxmet.__file__, "jaxmet/__init__.py is missing"
    assert documented(jaxmet)
    names = dict(public(jaxmet))
    assert names, "jaxmet/__init__.py offers nothing"
    assert not [name for name, value in names.items() if not documented(value)]


def test_docstrings_that_nobody_wrote_are_seen() -> None:
    @dataclass
    class Bare:
        x: int

    class Child(Exception):
        pass

    assert not documented(Bare) and not documented(Child)
    assert not documented(lambda: None) and documented(documented)


def test_top_level_has_only_the_usual_entries() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are part of it")
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    command += ["--cached", "--others", "--exclude-standard"]
    files = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    entries = {file.split("/")[0] for file in files}
    stray = {e for e in entries if e not in TOP_LEVEL and not e.startswith(".")}
    assert not stray, f"{sorted(stray)}: move them below jaxmet/, docs/ or benchmarks/"
    assert {"pyproject.toml", "README.md", "LICENSE", "jaxmet", "tests"} <= entries


def test_the_tests_run_strictly(request: pytest.FixtureRequest) -> None:
    """The laws mean what they say only under the settings of conftest.py."""
    assert jax.default_backend() != "cpu" or len(jax.devices()) == 8
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(3) + jnp.ones(3, jnp.bfloat16)
    assert "error" in request.config.getini("filterwarnings")
    checked = any(type(f).__module__.startswith("jaxtyping") for f in sys.meta_path)
    assert checked == (os.environ.get("JAXMET_TYPECHECK", "1") != "0")
    if checked:
        with pytest.raises(jaxtyping.TypeCheckError, match="cross"):
            lasso(jnp.eye(3), jnp.ones(4), 0.1, jnp.ones(3))


def test_keys_are_fresh_and_repeatable(
    keys: Iterator[jax.Array], request: pytest.FixtureRequest
) -> None:
    one, two = (jax.random.key_data(next(keys)) for _ in range(2))
    assert jnp.any(one != two)
    seed = zlib.crc32(request.node.nodeid.encode())
    again = jax.random.fold_in(jax.random.key(seed), 0)
    assert jnp.all(one == jax.random.key_data(again))

"""What is installed, from where, and what the package says of itself."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import jaxmet as jm
from jaxmet.plot import drawing
from jaxmet.tree.version import stated_version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
URLS = PROJECT["urls"]
INSTALLED = r"(?:pip3?|pipx|uvx?|conda|mamba|poetry|pdm|pixi|hatch|rye)\b"


def bare(text: str, source: str = URLS["Source"]) -> list[str]:
    """The places of a text that install jaxmet by its name from a package index.

    An extra (`jaxmet[plot]`) is one wherever it stands, the bare name in a command.
    """
    text = text.replace('\\"', '"')  # notebooks are JSON
    good = rf"jaxmet(?:\[[\w, -]+\])? @ git\+{re.escape(source)}(?=[\"'`\s@#]|$)"
    text = re.sub(good, "", text)
    found = re.findall(r"\bjaxmet\[[a-z, -]+\](?!\.)", text)
    command = rf"{INSTALLED}[^\n`]*?\b(?:install|add|run|inject)\b[^\n`]*"
    for line in re.findall(command, text):
        line = re.split(r"\s#|&&|;", line)[0]
        words = re.split(r"[\s'\",()]+", line)
        found += [w for w in words if w and re.fullmatch(r"jaxmet([=<>~!@].*)?", w)]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "pip install jaxmet",
        "`pip install -U jaxmet`",
        "    %pip install --quiet 'jaxmet[plot]'",
        '"    !pip install jaxmet==0.1.0\\n",',
        '"    %pip install --quiet \\"jaxmet[plot]\\"\\n",',
        "python -m pip install --upgrade numpy jaxmet>=0.1",
        "uv pip install jaxmet",
        "uv add jaxmet && python -m jaxmet",
        "the extra jaxmet[plot] brings Altair",
        "jaxmet[notebooks,docs]",
        "pip install 'jaxmet[plot] @ git+https://elsewhere.org/jaxmet'",
        "pip install 'jaxmet @ git+https://elsewhere.org/jaxmet'",
        "pip install 'jaxmet[plot] @ git+https://here.org/jaxmet-other'",
    ],
)
def test_what_installs_by_the_bare_name_is_seen(line):
    assert bare(line, "https://here.org/jaxmet")


@pytest.mark.parametrize(
    "line",
    [
        "pip install . && python -m jaxmet",
        "pip install '.[plot]'",
        "pip install -e '.[test,dev]' # for jaxmet",
        '"    %pip install --quiet \\"jaxmet[plot] @ git+https://here.org/jaxmet\\"\\n"',
        "pip install 'jaxmet @ git+https://here.org/jaxmet'",
        "pip install altair vl-convert-python",
        "pip install jaxmet-other/",
        'f"jaxmet.{caller}: give one of them"',
    ],
)
def test_what_installs_from_the_checkout_or_the_address_is_right(line):
    assert not bare(line, "https://here.org/jaxmet")


def test_nothing_installs_jaxmet_by_its_bare_name():
    """The name is nobody's on the package index: who registers it would run code there."""
    folders = ("jaxmet", "docs", "notebooks", "benchmarks", ".ci", ".github")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    kinds = {".py", ".md", ".ipynb", ".toml", ".yml", ".yaml", ".cfg", ".txt", ""}
    texts = {p: p.read_text("utf-8") for p in files if p.suffix in kinds}
    assert {ROOT / "README.md", ROOT / "pyproject.toml"} <= set(texts)
    assert sum(p.suffix == ".ipynb" for p in texts) >= 6 and len(texts) > 150
    for path in [
        p for p in texts if p.suffix == ".py"
    ]:  # messages, as they are printed
        nodes = ast.walk(ast.parse(texts[path]))
        stated = [n.value for n in nodes if isinstance(n, ast.Constant)]
        texts[path] += "\n".join(["", *(s for s in stated if isinstance(s, str))])
    wrong = {str(p.relative_to(ROOT)): bare(text) for p, text in texts.items()}
    assert {path: found for path, found in wrong.items() if found} == {}


def test_one_address_is_stated():
    assert {"Source", "Documentation", "Issues", "Changelog"} <= set(URLS)
    source = URLS["Source"]
    assert re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", source)
    assert all(url == source or url.startswith(f"{source}/") for url in URLS.values())
    # What stands for an address that is not known belongs to no one, and never will.
    assert "owner" not in source.lower() or source.startswith("https://OWNER.invalid/")
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    files += [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("jaxmet/**/*.py")]
    for path in files:
        for url in re.findall(r"git\+(\S+?)[\"'`\\\s]", path.read_text("utf-8")):
            assert url == source, path


def test_messages_name_the_packages_of_the_extra():
    names = {
        re.match(r"[\w-]+", r)[0] for r in PROJECT["optional-dependencies"]["plot"]
    }
    assert set(drawing.INSTALL.split()) == names


def test_the_version_is_that_of_pyproject(tmp_path):
    try:
        installed = version("jaxmet")
    except PackageNotFoundError:
        installed = "0+unknown"
    assert jm.__version__ == PROJECT["version"] == stated_version(ROOT)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "jaxmet"\nversion = "7.8"'
    )
    assert stated_version(tmp_path) == "7.8"
    # Beside an installed package stands no such file, or that of something else.
    for text in ("", '[project]\nname = "other"\nversion = "7.8"'):
        (tmp_path / "pyproject.toml").write_text(text)
        assert stated_version(tmp_path) == installed


@pytest.mark.slow
def test_the_wheel_has_types_urls_and_the_version(tmp_path):
    pytest.importorskip("hatchling")
    command = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        [metadata] = [n for n in names if n.endswith(".dist-info/METADATA")]
        text = file.read(metadata).decode()
    assert "jaxmet/py.typed" in names and f"\nVersion: {jm.__version__}\n" in text
    assert all(f"Project-URL: {name}, {url}\n" in text for name, url in URLS.items())

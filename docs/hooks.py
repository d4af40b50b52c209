"""What the site needs beside its pages: formulas as MathML, and files of the top level.

MkDocs runs the functions below by their names (`hooks:` in .mkdocs.yml).
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = {  # of the repository, and what the site calls them
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/rounding.svg": "rounding.svg",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?\)")
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_files(files: Any, *, config: Any) -> Any:
    """The pages that live elsewhere in the repository."""
    for source, name in BESIDE.items():
        if name not in files.src_uris:
            page = File.generated(config, name, abs_src_path=str(ROOT / source))
            files.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links that lead to the same file in the repository and on the site."""
    origin = {name: source for source, name in BESIDE.items() if name != "index.md"}
    folder = (ROOT / origin.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    depth = page.file.src_uri.count("/")

    def moved(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if not target.is_relative_to(ROOT):
            return found[0]
        name = target.relative_to(ROOT).as_posix()
        name = BESIDE.get(name, name.removeprefix("docs/"))
        return f"{found[1]}{'../' * depth}{name}{found[3] or ''})"

    return LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return FORMULA.sub(drawn, content)

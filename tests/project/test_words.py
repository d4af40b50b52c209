"""The field's words in all that users read: pages, docstrings and messages.

Retired words were translated rather than used by anybody; each stands here beside what is
written in its place.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RETIRED = {
    r"(?<![`/])\bsites?\b(?![`/-])": "layer",
    r"\bmakers?\b": "producer",
    r"\bforetold\b|\bforeseen\b|\bforetells?\b": "predicted",
    r"\bluckiest\b|\blucky draws?\b": "restart",
    r"\bso manieth\b": "every k-th",
    r"\btimes as dear\b": "weighted … times as heavily",
    r"\bbehind (?:the )?(?:fold|folding|adaround|equalization|rounding)\b": "after",
    r"\b(?:a|one) coarse grid\b": "low bit-width",
    r"\bleft alone\b": "skipped",
    r"\bfor who\b|\bwho knows AIMET\b": "if you know",
    r"\ba scale a (?:channel|tensor)\b|\ba row a (?:layer|node)\b": "one … per …",
    r"\bis no number\b": "raises unless … is a number",
    r"\bin the same bits\b": "bit-identical",
    r"\bsmall, integer and accurate\b": "quantizes and compresses …",
}


def strings(path: Path) -> list[tuple[int, str]]:
    """Docstrings and messages of a file, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.lineno, node.value))
    return found


def texts() -> list[tuple[str, int, str]]:
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "benchmarks/README.md",
    ]
    found = []
    for page in sorted(pages):
        if page.name == "CHANGELOG.md":  # it names what was renamed
            continue
        prose = re.sub(
            r"```.*?```",
            lambda m: "\n" * m[0].count("\n"),
            page.read_text("utf-8"),
            flags=re.S,
        )
        found += [
            (str(page.relative_to(ROOT)), n, line)
            for n, line in enumerate(prose.split("\n"), 1)
        ]
    for source in sorted((ROOT / "jaxmet").rglob("*.py")):
        found += [
            (str(source.relative_to(ROOT)), n, text) for n, text in strings(source)
        ]
    return found


ALL = texts()


@pytest.mark.parametrize("word", RETIRED)
def test_retired_words_are_written_nowhere(word):
    wrong = [
        f"{name}:{line} has {match[0]!r}"
        for name, line, text in ALL
        for match in [re.search(word, text, re.I)]
        if match
    ]
    assert not wrong, f"write {RETIRED[word]!r}: {wrong}"


def test_the_search_reads_pages_and_code():
    names = {name for name, _, _ in ALL}
    assert {"README.md", "docs/index.md", "jaxmet/__init__.py"} <= names
    assert any("exactly one" in text or "quantizer" in text for _, _, text in ALL)
    assert re.search(list(RETIRED)[1], "the makers of a channel")

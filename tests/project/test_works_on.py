"""The page of what works on what is what the zoo says today."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_page_is_up_to_date():
    page = runpy.run_path(str(DOCS / "works_on.py"))["page"]()
    assert page == (DOCS / "works-on.md").read_text(encoding="utf-8"), (
        "run `python docs/works_on.py`"
    )

"""One HTML page that opens offline: text, tables, and charts drawn by inlined Vega."""

import html
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmet.plot.drawing import drawn_rows
from jaxmet.tree.table import Table


class Section(NamedTuple):
    """A heading and the text below it, as HTML."""

    title: str
    body: str


class Picture(NamedTuple):
    """A chart for the page: its HTML and the specification that is drawn into it."""

    body: str
    spec: dict[str, Any]


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: #1d2530; background: #fff; max-width: 1020px; margin: 0 auto;
  padding: 40px 28px 90px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 48px 0 10px; padding-top: 14px;
  border-top: 1px solid #dfe3e8; }
p { margin: 8px 0; max-width: 76ch; }
.quiet, footer { color: #5b6470; }
a { color: #2f6f9f; text-decoration: none; }
a:hover { text-decoration: underline; }
nav { margin: 20px 0; padding: 12px 18px; background: #f5f7f9; border-radius: 6px; }
nav ol { margin: 0; padding-left: 20px; columns: 2; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0; }
.figure { background: #f5f7f9; border-radius: 6px; padding: 10px 18px; min-width: 130px; }
.figure b { display: block; font-size: 22px; font-weight: 600; }
.chart { margin: 14px 0 4px; overflow-x: auto; min-height: 40px; }
.chart.tall { max-height: 900px; overflow-y: auto; border: 1px solid #dfe3e8;
  border-radius: 6px; padding: 10px; }
.scroll { overflow-x: auto; max-height: 620px; overflow-y: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 6px 0;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #5b6470; padding-bottom: 6px; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid #eceff3;
  vertical-align: top; }
th { font-weight: 600; position: sticky; top: 0; background: #fff; }
details { margin: 6px 0 16px; }
summary { cursor: pointer; color: #2f6f9f; font-size: 13px; }
@media print { nav { display: none; } .scroll, .chart.tall { max-height: none; } }
"""

SCRIPT = """
for (const place of document.querySelectorAll("div.chart")) {
  const spec = JSON.parse(document.getElementById(place.id + "-spec").textContent);
  vegaEmbed(place, spec, {renderer: "svg", actions: {export: true, source: false,
    compiled: false, editor: false}}).then(
      () => { place.dataset.state = "drawn"; },
      (error) => { place.dataset.state = "failed"; console.error(error); });
}
"""


def picture(chart: Any, name: str, *, tall: bool = False) -> Picture:
    """A chart's place on the page; `data-rows` are the marks that its rows must make."""
    spec = chart.to_dict()
    kind = "chart tall" if tall else "chart"
    body = f'<div class="{kind}" id="{name}" data-rows="{drawn_rows(spec)}"></div>'
    return Picture(body, spec)


def table_html(table: Table) -> str:
    """A table, scrolling where it is large."""
    return f'<div class="scroll">{table._repr_html_()}</div>'


def folded(summary: str, body: str) -> str:
    """What is shown when somebody asks for it."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def page(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    specs: dict[str, dict[str, Any]],
    script: str,
) -> str:
    """The whole file. `specs` are the charts by the id of their place, `script` is Vega."""
    items = [
        f'<li><a href="#part{i}">{html.escape(s.title)}</a></li>'
        for i, s in enumerate(sections)
    ]
    parts = [
        f'<section id="part{i}"><h2>{html.escape(s.title)}</h2>{s.body}</section>'
        for i, s in enumerate(sections)
    ]
    data = [
        f'<script type="application/json" id="{name}-spec">{as_json(spec)}</script>'
        for name, spec in specs.items()
    ]
    run = [f"<script>{inside(script)}</script>", f"<script>{SCRIPT}</script>"]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            '<link rel="icon" href="data:,">',  # or a browser asks for one
            f"<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="quiet">{html.escape(subtitle)}</p>',
            f"<nav><ol>{''.join(items)}</ol></nav>",
            *parts,
            *data,
            *(run if specs else []),
            "</body>\n</html>\n",
        ]
    )


def as_json(spec: Any) -> str:
    """JSON that may stand in a script: nothing in it ends one or begins a comment."""
    text = json.dumps(spec, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def inside(script: str) -> str:
    """A script whose strings cannot end the element that it stands in."""
    return re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE)

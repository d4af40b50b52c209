"""What the reference of the site needs to be told about this package.

A docstring is Markdown, but for two things: `>>>` at the beginning of a line would be a
quotation there, and a list in columns one paragraph. And where a file and the function in
it have one name, a package that imports the function has that under the name, as in Python.

MkDocs loads this extension of griffe (`extensions:` in .mkdocs.yml).
"""

import re
from typing import Any

import griffe


class Reference(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Say the value of a default that is a constant of the file."""
        for parameter in func.parameters:
            constant = func.module.members.get(str(parameter.default))
            if isinstance(constant, griffe.Attribute) and constant.value is not None:
                parameter.default = constant.value

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        prefer_functions(pkg)


def prefer_functions(module: griffe.Module) -> None:
    """Let `from a.b.c import c` in a.b mean the function in all of a package."""
    for name, part in list(module.members.items()):
        if not isinstance(part, griffe.Module):
            continue
        prefer_functions(part)
        if module.imports.get(name) == f"{part.path}.{name}":
            module.members[name] = griffe.Alias(name, part.members[name], parent=module)


def as_markdown(text: str) -> str:
    """Examples, from `>>>` to an empty line, in a fence; columns and arguments as lists."""
    lines: list[str] = []
    inside = False
    section = None
    for line in text.splitlines():
        if opened := re.fullmatch(r"(Args|Returns|Raises):", line):
            section = opened[1]
            lines += ["", f"**{section}:**", ""]
            continue
        if section and line and not line.startswith(" "):
            section = None
        if section:
            item = re.match(r" {4}(\*{0,2}\w+): (.*)", line)
            named = item if section != "Returns" else None
            lines.append(f"- `{named[1]}`: {named[2]}" if named else line[4:])
            continue
        if line.startswith(">>>") and not inside:
            lines += ["", "```pycon"]
            inside = True
        elif inside and not line.strip():
            lines += ["```"]
            inside = False
        column = None if inside else re.match(r"(\w+/?) {2,}(\S.*)", line)
        lines.append(f"- **{column[1]}**: {column[2]}" if column else line)
    return "\n".join(lines + ["```"] * inside)

"""The messages that gradtools raises, read off its source.

A message is a pattern: its constant words, with anything in between. It comes from the
first argument of an exception's constructor or of ``warnings.warn``.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gradtools as gt

PACKAGE = Path(gt.__file__).parent
OURS = {name for name in gt.__all__ if name.endswith("Error")}
OF_USERS = {*OURS, "TypeError", "ImportError", "ValueError", "RuntimeError"}
OF_USERS |= {"_UsageError", "warn"}

# Raised and caught within the package.
INTERNAL = {
    ("trees.py", "another length"),
    ("trees.py", "another type"),
    ("trees.py", "other keys"),
}


class Message(NamedTuple):
    """Where a message is raised, and its constant parts, in order."""

    place: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'…'.join(self.parts)}   ({self.place})"

    @property
    def weight(self) -> int:
        return sum(map(len, self.parts))

    def matches(self, text: str) -> bool:
        pattern = ".*".join(map(re.escape, self.parts))
        return re.fullmatch(pattern, text) is not None


@functools.cache
def messages() -> list[Message]:
    """Return every message of the package."""
    return [
        message
        for path in sorted(PACKAGE.rglob("*.py"))
        for message in _of(path)
        if (path.name, "".join(message.parts)) not in INTERNAL
    ]


def _of(path: Path) -> Iterator[Message]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and _is_raised(node.func):
            parts = tuple(re.split("…+", _text(node.args[0])))
            yield Message(f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", parts)


def _is_raised(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return ast.unparse(function) == "warnings.warn"
    return isinstance(function, ast.Name) and function.id in OF_USERS


def _text(node: ast.expr) -> str:
    """Return a message with ``…`` for what is not constant."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(_text, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case _:
            return "…"


def mistakes() -> set[str]:
    """Return the kinds of mistakes that the diagnosis tells apart."""
    tree = ast.parse((PACKAGE / "gradcheck/diagnosis.py").read_text(encoding="utf-8"))
    return {
        node.value.elts[0].value
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
        if isinstance(node.value.elts[0], ast.Constant)
    }

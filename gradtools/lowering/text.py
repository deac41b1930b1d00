"""Pieces of Python text: taking containers apart, putting them together, testing."""

from __future__ import annotations

import functools
import linecache
import types
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from gradtools.trees import Outline

__all__ = [
    "Lines",
    "compiled",
    "indented",
    "names",
    "numbered",
    "put",
    "row",
    "same",
    "taken",
    "unless",
]

Lines = Iterator[str]


def row(parts: Iterable[str]) -> str:
    """Return the text of a tuple."""
    parts = list(parts)
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def numbered(prefix: str) -> Callable[[int], str]:
    """Name leaves by their numbers."""
    return lambda number: f"{prefix}{number}"


def names(prefix: str, outline: Outline) -> list[str]:
    """Return the names of the leaves."""
    return [f"{prefix}{leaf.number}" for leaf in outline.leaves()]


def indented(lines: Lines) -> Lines:
    """Write lines one level further in."""
    return (f"    {line}" for line in lines)


def unless(tests: Sequence[str], otherwise: str, indent: str = "    ") -> Lines:
    """Write a test that all hold."""
    if tests:
        yield f"{indent}if not ("
        for number, test in enumerate(tests):
            yield f"{indent}    {'and ' if number else ''}{test}"
        yield f"{indent}):"
        yield f"{indent}    {otherwise}"


def put(outline: Outline, name: Callable[[int], str]) -> str:
    """Return the text that puts leaves into their containers."""
    if outline.kind in (None, torch.Size):
        return name(outline.number)
    below = [put(child, name) for child in outline.children]
    if outline.kind is tuple:
        return row(below)
    if outline.kind is list:
        return f"[{', '.join(below)}]"
    pairs = zip(outline.keys, below, strict=True)
    return "{" + ", ".join(f"{key!r}: {value}" for key, value in pairs) + "}"


def taken(
    outline: Outline,
    value: str,
    prefix: str,
    otherwise: str,
    *,
    optional: bool = False,
) -> Lines:
    """Take a container apart; leaves get names.

    Args:
        outline: What it must look like.
        value: The name by which the code knows it.
        prefix: Of the leaves' names.
        otherwise: What to do where it does not look like that.
        optional: None may stand for any container, and for all that is in it.
    """
    if outline.kind in (None, torch.Size):
        if value != f"{prefix}{outline.number}":
            yield f"{prefix}{outline.number} = {value}"
        return
    kind, count = outline.kind.__name__, len(outline.children)
    below = [
        f"{value}_{index}" if child.kind else f"{prefix}{child.number}"
        for index, child in enumerate(outline.children)
    ]
    tests = [f"type({value}) is not {kind}"]
    if outline.kind is dict and not optional:  # whoever walks over it sees the order
        tests.append(f"list({value}.keys()) != {list(outline.keys)!r}")
    else:
        tests.append(f"len({value}) != {count}")
        tests += [f"{key!r} not in {value}" for key in outline.keys]
    inside = [f"if {' or '.join(tests)}:", f"    {otherwise}"]
    if outline.kind is dict:
        inside += [
            f"{name} = {value}[{key!r}]"
            for name, key in zip(below, outline.keys, strict=True)
        ]
    elif below:
        inside += [f"{row(below)} = {value}"]
    for name, child in zip(below, outline.children, strict=True):
        inside += taken(child, name, prefix, otherwise, optional=optional)
    if optional:
        inner = names(prefix, outline)
        yield f"if {value} is None:"
        yield f"    {' = '.join([*inner, 'None'])}" if inner else "    pass"
        yield "else:"
        yield from (f"    {line}" for line in inside)
    else:
        yield from inside


def same(to: Outline, prefix: str, source: Outline, of: str) -> Lines:
    """Give the leaves of one outline to those of another."""
    for new, old in zip(to.leaves(), source.leaves(), strict=True):
        yield f"{prefix}{new.number} = {of}{old.number}"


@functools.lru_cache(maxsize=256)
def compiled(text: str, name: str) -> types.CodeType:
    """Compile a module's text; it will show in tracebacks under a rule's name."""
    file = f"<gradtools {name} {hash(text):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    return compile(text, file, "exec")

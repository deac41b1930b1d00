"""Small tables: as text for a terminal, as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["as_html", "as_text"]

Rows = Sequence[Sequence[str]]


def as_text(title: str, rows: Rows) -> str:
    """Return a title and below it the rows, indented, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def as_html(title: str, rows: Rows, headings: Sequence[str] = ()) -> str:
    """Return a table with a caption; what is in the cells is text, not HTML."""
    from html import escape

    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{escape(title)}</caption>"
        + (f"<thead><tr>{head}</tr></thead>" if head else "")
        + f"<tbody>{body}</tbody></table>"
    )

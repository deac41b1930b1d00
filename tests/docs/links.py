"""Whether every link and image of built pages leads somewhere.

``python -m tests.docs.links FOLDER`` exits with 1 and a list where one does not. Links
to other hosts are not followed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.anchors = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.references.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken(folder: Path) -> Iterator[str]:
    """Yield ``page: reference`` for each one that leads nowhere."""
    folder = folder.resolve()
    pages = {path: _Page(path) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        for reference in page.references:
            if not _leads_somewhere(path, reference, pages):
                yield f"{path.relative_to(folder)}: {reference}"


def _leads_somewhere(path: Path, reference: str, pages: dict[Path, _Page]) -> bool:
    parts = urlsplit(reference)
    if parts.scheme or parts.netloc:
        return parts.scheme in ("http", "https", "data", "mailto")
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target not in pages:
        return target.is_file() and not parts.fragment
    return unquote(parts.fragment) in pages[target].anchors


def main() -> int:
    """Check the pages of a folder."""
    folder = Path(sys.argv[1])
    found = list(broken(folder))
    print("\n".join(found) or f"{folder}: every link within leads somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

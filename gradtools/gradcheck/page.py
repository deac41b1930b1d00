"""Reports as one HTML page, with pictures of the derivatives.

The page needs no other file and runs no script. Its pictures, of
:mod:`.pictures`, take the colours of the page, light or dark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from gradtools.gradcheck.pictures import pictures
from gradtools.gradcheck.report import Evidence, Outcome, Report

__all__ = ["page"]


def page(reports: Sequence[Report]) -> str:
    """Return reports as one self-contained HTML document.

    Args:
        reports: In the order in which they appear.

    Returns:
        The text of the document.

    Raises:
        ImportError: A report has pictures and matplotlib is not installed.
    """
    sections = [_section(report, place) for place, report in enumerate(reports)]
    body = [
        "<h1>Gradient checks</h1>",
        f'<p class="counts">{_counts(reports)}</p>',
        _contents(reports) if len(reports) > 1 else "",
        *sections,
    ]
    return _DOCUMENT.format(style=_STYLE, body="\n".join(body))


def _counts(reports: Sequence[Report]) -> str:
    rules = len({report.rule for report in reports})
    found = Counter(report.outcome for report in reports)
    order: tuple[Outcome, ...] = ("failed", "not checked", "passed")
    parts = [f"{_badge(name, found[name])}" for name in order if found[name]]
    return f"{_number(len(reports), 'report')} of {_number(rules, 'rule')} " + " ".join(
        parts
    )


def _contents(reports: Sequence[Report]) -> str:
    rows: list[str] = []
    for number, report in enumerate(reports):
        name, place = _name_and_place(report)
        rows.append(
            f'<li>{_badge(report.outcome)} <a href="#report-{number}">{escape(name)}'
            f"</a> <small>{escape(place)} {escape(report.signature)}</small></li>"
        )
    return f"<nav><ul>{''.join(rows)}</ul></nav>"


def _section(report: Report, number: int) -> str:
    name, place = _name_and_place(report)
    took = f"{report.seconds * 1e3:.1f} ms, {_number(report.evaluations, 'evaluation')}"
    facts = {
        "stated in": place,
        "arguments": report.signature,
        "contract": report.contract,
        "took": took,
    }
    rows = [
        f"<dt>{name}</dt><dd>{escape(text)}</dd>"
        for name, text in facts.items()
        if text
    ]
    return "\n".join(
        [
            f'<section id="report-{number}">',
            f"<h2>{escape(name)} {_badge(report.outcome)}</h2>",
            f"<dl>{''.join(rows)}</dl>",
            _failure(report),
            _table(report.evidence),
            *(
                pictures(shown, f"{number}-{place}")
                for place, shown in enumerate(report.figures)
            ),
            "</section>",
        ]
    )


def _name_and_place(report: Report) -> tuple[str, str]:
    """Split "swish (swish.py:3)"."""
    name, _, place = report.rule.partition(" (")
    return name, place.removesuffix(")")


def _failure(report: Report) -> str:
    if report.failure is None:
        return ""
    return f"<pre>{escape(str(report.failure))}</pre>"


def _table(evidence: Sequence[Evidence]) -> str:
    rows = [
        f"<tr><td>{_badge(item.outcome)}</td><td>{escape(item.capability)}</td>"
        f"<td>{escape(item.question)}</td><td>{escape(item.detail)}</td>"
        f'<td class="number">{_short(item.error)}</td></tr>'
        for item in evidence
    ]
    headings = ("outcome", "of", "question", "detail", "error")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _badge(outcome: Outcome, count: int | None = None) -> str:
    text = outcome if count is None else f"{count} {outcome}"
    return f'<span class="badge {outcome.replace(" ", "-")}">{text}</span>'


def _number(count: int, of: str) -> str:
    return f"{count} {of}" + ("" if count == 1 else "s")


def _short(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Gradient checks</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2026; --soft: #66707c; --line: #dfe3e8;
  --raised: #f5f7f9; --passed: #1f7a50; --failed: #c62f35; --open: #96660a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e4e7eb; --soft: #98a1ad; --line: #2f353d;
    --raised: #1d2126; --passed: #58c593; --failed: #ff7b7f; --open: #e0ad4e;
  }
}
body {
  max-width: 78rem; margin: 0 auto; padding: 1.5rem;
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
section { border-top: 1px solid var(--line); margin-top: 1.6rem; padding-top: 1.2rem; }
small, dt, th, figcaption { color: var(--soft); font-weight: normal; }
nav ul { list-style: none; padding: 0; }
a { color: inherit; }
code, pre, dd { font-family: ui-monospace, monospace; font-size: .9em; }
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0;
}
dd { margin: 0; overflow-wrap: anywhere; }
pre {
  background: var(--raised); border-left: 3px solid var(--failed);
  padding: .7rem 1rem; overflow-x: auto;
}
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin-top: .8rem; width: 100%; }
th, td {
  text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line);
}
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.badge {
  display: inline-block; border: 1px solid; border-radius: 1em; padding: 0 .6em;
  font-size: .8rem; font-weight: normal; white-space: nowrap; color: var(--soft);
}
.passed { color: var(--passed); }
.failed { color: var(--failed); }
.not-checked { color: var(--open); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { flex: 1 1 18rem; max-width: 28rem; margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { text-align: center; font-size: .85rem; }
"""

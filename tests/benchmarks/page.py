"""The page: tables from the runs that were stored, in plain markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tests.benchmarks import ledger
from tests.benchmarks.ledger import ALLOWANCE, MEAN, History, Row, Run
from tests.benchmarks.plots import Picture
from tests.benchmarks.reasons import REASONS
from tests.benchmarks.rivals import CONTESTS
from tests.benchmarks.rivals.contest import COMBINED, COMPOSITE, GRADTOOLS

RULES = tuple(CONTESTS)
HEAD = """\
# Performance

What a rule costs beside the same rule written by hand. `make bench` measures all of
this and writes this page; the figures of each run are in
`docs/performance/runs`.
"""
HOW = f"""\
## Where the time goes

A call that is made up like one before (the same kinds of arguments, residuals and
results, with the same tensors among the residuals) is served by code that gradtools
writes for it: what an expert would have written, with a test that everything is where
it was, and the verification of what bwd returns. It begins with the third call of a
signature whose bwd has run, shows in tracebacks, and hands a call that turns out to be
different over to the general way. Under torch.func a rule goes past
`torch.autograd.Function.apply`, which makes a class per call and level. Under
torch.compile Dynamo follows code that is written for the call as well, so that it has
little to guard on.

The general way takes longer; the tables have it as a row of its own. What goes it
always: rules with `autocast=`, and calls under autocast; arguments,
results or residuals that are objects (modules, callables, dataclasses, `self`);
`**kwargs`; a fwd that draws random numbers; the policy "always"; and what has more than
128 shapes in turn.

## How it was measured

Four rules, in float32, in every way in which an expert would write them, with the same
arithmetic: **exp** (its output is its residual), **swish** (a residual is computed, two
arguments have a gradient), **linear** (data without a gradient; bwd computes what is
needed) and **affine** (parameters in a dict, two results). The spellings are gradtools
with its defaults, checked before the clock starts; the hand-written `{COMBINED}`; the
composable one with `setup_context`; that with `generate_vmap_rule`, and with a vmap of
its own; `torch.library.custom_op`; and the plain expression under autograd. A test
holds that all of them compute the same.

Contenders run in turns, in blocks of about two milliseconds, in an order that is drawn
anew in each round, one thread, no collection of garbage within a block, and memory that
is freed stays with the process. A ratio is the median of the rounds' ratios; behind it
its 95% interval by bootstrap over rounds. Tiny tensors have four numbers. A ratio
meets its bar with the whole interval below the bar and {ALLOWANCE}. *All runs* is the
smallest and the largest value of the runs that were stored.
"""


def write(runs: Sequence[Run], pictures: Mapping[str, Sequence[Picture]]) -> str:
    """Return the page.

    Args:
        runs: All that were stored, the oldest first.
        pictures: What was drawn, by device.
    """
    parts = [HEAD, table_of_runs(runs)]
    for device in dict.fromkeys(run.device for run in runs):
        mine = [run for run in runs if run.device == device]
        found = ledger.histories(mine)
        if device != "cpu":
            parts.append("# On a GPU\n")
        parts += [
            HOW if device == "cpu" else "",
            bars(found),
            missed(found),
            times(found),
            vmapped(found),
            compiled(found),
            triton(found),
            instructions(found),
            memory(found),
            curvature(found),
            start(found),
            others(found),
            check(found),
            plots(pictures.get(device, ())),
        ]
    return "\n".join(part for part in parts if part)


# Small pieces.


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, or nothing where it has no rows; figures stand to the right."""
    rows = list(rows)
    if not rows:
        return ""
    columns = zip(*rows, strict=True)
    marks = ["--:" if is_of_figures(column) else "---" for column in columns]
    lines = [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]
    return "\n".join(lines) + "\n"


def is_of_figures(column: Iterable[str]) -> bool:
    """Whether all that stands in a column begins with a digit."""
    return all(cell.lstrip("-")[:1].isdigit() for cell in column if cell)


def section(title: str, text: str, body: str) -> str:
    """Return a section, or nothing where it is empty."""
    return f"## {title}\n\n{text}\n{body}" if body else ""


def number(value: float, unit: str) -> str:
    """Return a figure with its unit."""
    match unit:
        case "ratio":
            return f"{value:.2f}"
        case "us":
            return f"{value:,.0f} μs" if abs(value) >= 100 else f"{value:.1f} μs"
        case "ms":
            return f"{value:.3g} ms"
        case "s":
            return f"{value:.3g} s"
        case "bytes":
            return f"{value:,.0f} B"
        case _:
            return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def with_interval(row: Row) -> str:
    """Return a figure and its interval, if it has noise."""
    middle = number(row.value, row.unit)
    if row.is_exact:
        return middle
    low, high = (number(end, row.unit).split()[0] for end in (row.low, row.high))
    return f"{middle} [{low}, {high}]"


def spread(history: History) -> str:
    """Return the figures of all runs."""
    low, high = history.spread
    count = len(history.values)
    if count == 1:
        return "one run"
    low_text, high_text = (number(end, history.row.unit) for end in (low, high))
    if low_text == high_text:
        return f"{low_text} in {count}"
    return f"{low_text.split()[0]} to {high_text} in {count}"


def verdict(row: Row) -> str:
    """Return whether a bar is met."""
    if row.bar is None:
        return ""
    return "met" if row.is_met else "**MISSED**"


def picked(found: Sequence[History], **fields: object) -> list[History]:
    """Return the rows with these fields."""
    return [
        one
        for one in found
        if all(getattr(one.row, name) == value for name, value in fields.items())
    ]


def works(found: Sequence[History]) -> list[str]:
    """Return what was done, in order."""
    return list(dict.fromkeys(one.row.work for one in found))


def code(name: str) -> str:
    """Return a name as code where it is code."""
    return f"`{name}`" if any(sign in name for sign in "_(.") else name


# The sections.


def table_of_runs(runs: Sequence[Run]) -> str:
    """Return where and when was measured."""
    rows = [
        (
            run.name,
            str(run.machine.get("gpu", run.machine["cpu"])),
            str(run.machine["cores"]),
            str(run.machine["torch"]),
            str(run.machine["python"]),
            ", ".join(dict.fromkeys(row.section for row in run.rows)),
        )
        for run in runs
    ]
    head = ("run", "processor", "cores", "torch", "Python", "what")
    return table(head, rows)


def bars(found: Sequence[History]) -> str:
    """Return all that was promised."""
    rows = []
    for one in found:
        row = one.row
        if row.bar is not None:
            of = row.rule and (row.rule if row.rule != MEAN else "mean of four rules")
            rows.append(
                (
                    row.work + (f", {of}" if of else ""),
                    code(row.reference),
                    with_interval(row),
                    spread(one),
                    number(row.bar, row.unit),
                    verdict(row),
                )
            )
    head = ("work", "beside", "figure", "all runs", "at most", "")
    text = "Every figure that has a bar, as it was measured last.\n"
    return section("What was promised", text, table(head, rows))


def missed(found: Sequence[History]) -> str:
    """Return the bars that are missed, each with its reason."""
    lines = []
    for one in found:
        row = one.row
        if not row.is_met and row.bar is not None:
            key = row.section, row.work, row.rule, row.reference
            reason = REASONS.get(key, "no reason recorded")
            beside = f" beside {code(row.reference)}" if row.reference else ""
            of = f", {row.rule}" if row.rule else ""
            lines.append(
                f"- **{row.work}{of}{beside}**: {with_interval(row)}, "
                f"at most {number(row.bar, row.unit)}. {reason}"
            )
    body = "\n".join(lines) + "\n" if lines else "Nothing.\n"
    return f"## What misses, and why\n\n{body}"


def by_rule(found: Sequence[History], head: str, name: Callable[[Row], str]) -> str:
    """Return ratios with a column for each rule and their mean."""
    rows = []
    for key in dict.fromkeys((h.row.contender, h.row.reference) for h in found):
        mine = {
            one.row.rule: one
            for one in picked(found, contender=key[0], reference=key[1])
        }
        if MEAN not in mine:
            continue
        rows.append(
            (
                name(mine[MEAN].row),
                *(
                    number(mine[r].row.value, "ratio") if r in mine else ""
                    for r in RULES
                ),
                with_interval(mine[MEAN].row),
                spread(mine[MEAN]),
            )
        )
    return table((head, *RULES, MEAN, "all runs"), rows)


def absolute(found: Sequence[History], head: str) -> str:
    """Return times with a column for each rule."""
    rows = []
    for contender in dict.fromkeys(one.row.contender for one in found):
        mine = {one.row.rule: one.row for one in picked(found, contender=contender)}
        cells = (
            number(mine[r].value, mine[r].unit) if r in mine else "" for r in RULES
        )
        rows.append((code(contender), *cells))
    return table((head, *RULES), rows)


def ratios_and_times(found: Sequence[History], work: str) -> str:
    """Return both tables of a work."""
    mine = picked(found, work=work)
    ratios = by_rule(
        picked(mine, unit="ratio"),
        "ratio",
        lambda row: f"{code(row.contender)} / {code(row.reference)}",
    )
    alone = absolute(picked(mine, unit="us", reference=""), "time of a call")
    return "\n".join(part for part in (ratios, alone) if part)


def times(found: Sequence[History]) -> str:
    """Return the eager times."""
    mine = picked(found, section="speed")
    parts = []
    for work in works(mine):
        over = [
            (
                code(one.row.contender),
                one.row.rule,
                with_interval(one.row),
                spread(one),
            )
            for one in picked(mine, work=work, unit="us")
            if one.row.reference
        ]
        head = ("contender", "rule", "longer than the function itself", "all runs")
        parts.append(f"### {work.capitalize()}\n")
        parts += [ratios_and_times(mine, work), table(head, over)]
    text = (
        "Without a gradient a rule runs the function itself; what it takes longer is "
        "the way there.\n"
    )
    return section("Time of a call", text, "\n".join(part for part in parts if part))


def vmapped(found: Sequence[History]) -> str:
    """Return the times under vmap."""
    mine = picked(found, section="vmap")
    parts = [f"### {work}\n\n{ratios_and_times(mine, work)}" for work in works(mine)]
    text = (
        "A batch of 32 samples of 8 numbers; the other arguments are shared. A vmap of "
        "its own is what an expert writes for one rule and one batched argument.\n"
    )
    return section("vmap", text, "\n".join(parts))


def compiled(found: Sequence[History]) -> str:
    """Return what torch.compile makes of it."""
    mine = picked(found, section="compiled")
    counts = [
        (one.row.work, one.row.rule, one.row.note, verdict(one.row))
        for one in mine
        if one.row.is_exact
    ]
    parts = [table(("graphs", "rule", f"gradtools against `{COMBINED}`", ""), counts)]
    for work in works([one for one in mine if not one.row.is_exact]):
        parts += [f"### {work.capitalize()}\n", ratios_and_times(mine, work)]
    text = (
        "`torch.compile(fullgraph=True)`. Nodes are those of aten in the graphs of AOT "
        "autograd; compilations are counted with `aot_eager`.\n"
    )
    return section("Compiled", text, "\n".join(part for part in parts if part))


def triton(found: Sequence[History]) -> str:
    """Return the times of kernels in Triton, by shape."""
    mine = picked(found, section="triton")
    ratios = [one for one in mine if one.row.reference]
    alone = [one for one in mine if not one.row.reference]
    pairs = dict.fromkeys((one.row.contender, one.row.reference) for one in ratios)
    names = dict.fromkeys(one.row.contender for one in alone)
    rows = []
    for shape in dict.fromkeys(one.row.rule for one in ratios):
        here = {
            (one.row.contender, one.row.reference): with_interval(one.row)
            for one in ratios
            if one.row.rule == shape
        }
        spent = {
            one.row.contender: number(one.row.value, one.row.unit)
            for one in picked(alone, rule=shape)
        }
        rows.append(
            (
                shape,
                *(spent.get(name, "") for name in names),
                *(here.get(pair, "") for pair in pairs),
            )
        )
    head = (
        "rows x columns",
        *(code(name) for name in names),
        *(f"{code(contender)} / {code(reference)}" for contender, reference in pairs),
    )
    text = (
        "Forward and backward of a softmax over rows, float32: two kernels in Triton "
        f"under a rule, the same two in a `{COMBINED}` by hand, and torch's own. "
        "No bar.\n"
    )
    return section("Triton", text, table(head, rows))


def instructions(found: Sequence[History]) -> str:
    """Return counts of instructions."""
    mine = picked(found, section="instructions")
    parts = []
    for work in works(mine):
        here = picked(mine, work=work)
        parts += [
            f"### {work.capitalize()}\n",
            by_rule(
                picked(here, unit="ratio"),
                "ratio",
                lambda row: f"{code(row.contender)} / {code(row.reference)}",
            ),
            absolute(picked(here, unit="count"), "instructions of a call"),
        ]
    text = "By callgrind, all in one process; other load does not change them.\n"
    return section("Instructions", text, "\n".join(parts))


def memory(found: Sequence[History]) -> str:
    """Return bytes, and what keeping the inputs costs."""
    mine = picked(found, section="memory")
    rows = [
        (
            f"{one.row.work}, {one.row.rule}",
            code(one.row.contender),
            number(one.row.value, one.row.unit),
            one.row.note,
            spread(one),
            verdict(one.row),
        )
        for one in mine
    ]
    head = ("what", "who", f"beside `{COMBINED}`", "bytes", "all runs", "")
    text = "All storages that operators made and that are alive, to the byte.\n"
    return section("Memory", text + keeping(mine), table(head, rows))


def keeping(found: Sequence[History]) -> str:
    """Return in words what the inputs cost that only second derivatives read."""
    kept = {
        one.row.contender: one.row
        for one in picked(found, work="kept by a network")
        if one.row.contender != COMPOSITE
    }
    if len(kept) < 2:
        return ""
    default = kept.pop(GRADTOOLS)
    (once,) = kept.values()
    return (
        "\n**What keeping the inputs costs.** A rule that computes residuals keeps its "
        "inputs as well by default, also those that bwd never reads: second "
        "derivatives need them. In a network of "
        f"{default.rule} of attention and perceptron, whose layer norms keep "
        "(normalized, scale, weight) and whose activations keep a derivative only, "
        f"the forward then keeps **{default.value:.2f} times** the bytes of the "
        f"hand-written Functions ({default.note}). With `once_differentiable=True` it "
        f"is {once.value:.2f} times. Rules whose residuals contain their inputs pay "
        "nothing. So the default stays: a second derivative that is right without "
        "another word is what a rule promises, only rules that read none of their "
        "inputs pay for it, and one word takes it back.\n\n"
    )


def curvature(found: Sequence[History]) -> str:
    """Return what products of Hessians cost beside other spellings."""
    mine = picked(found, section="second order")
    bodies = []
    for job in works(mine):
        rows = [h.row for h in mine if h.row.work == job and h.row.unit == "us"]
        names = list(dict.fromkeys(row.rule for row in rows))
        spellings = dict.fromkeys(row.contender for row in rows)
        lines = []
        for spelling in spellings:
            cells = {r.rule: r.value for r in rows if r.contender == spelling}
            times = (f"{cells[n] / 1e3:,.1f}" if n in cells else "" for n in names)
            lines.append((code(spelling), *times))
        bodies.append(f"**{job}**, in milliseconds\n\n{table(('', *names), lines)}")
    compared = [h for h in mine if h.row.unit == "ratio"]
    lines = [
        (*(row.work, row.rule, row.reference), with_interval(row), row.note)
        for row in (h.row for h in compared)
    ]
    head = ("", "workload", "beside", "gradtools", "who that is, and who is left out")
    return section(
        "Second order",
        "Each product beside every other spelling on the same workload; what raises "
        "there, or is off by more than a thousandth, does not count. On the CPU, times "
        "are those that a processor was at work for the thread, which other work on "
        "the machine does not count into (runs before 2026-11-26: by the clock on the "
        "wall). Peaks are of what is alive at once, to the byte. An empty cell: not "
        "right there.",
        "\n".join((*bodies, table(head, lines))) if mine else "",
    )


def start(found: Sequence[History]) -> str:
    """Return what the start of a process costs."""
    rows = [
        (
            one.row.work,
            with_interval(one.row) + (f" ({one.row.note})" if one.row.note else ""),
            spread(one),
            verdict(one.row),
        )
        for one in picked(found, section="start")
    ]
    text = "Medians of fresh processes.\n"
    return section("Start", text, table(("what", "figure", "all runs", ""), rows))


def others(found: Sequence[History]) -> str:
    """Return times in JAX."""
    mine = picked(found, section="jax")
    parts = [
        f"### {work.capitalize()}, beside JAX\n\n"
        + absolute(picked(mine, work=work), "time of a call")
        for work in works(mine)
    ]
    version = mine[0].row.note if mine else ""
    text = (
        f"Another framework: {version}, `jax.custom_vjp`, float32 on a CPU, one "
        "thread, in the same process and turns. No bar.\n"
    )
    return section("Other frameworks", text, "\n".join(parts))


def check(found: Sequence[History]) -> str:
    """Return what the check of a first call costs."""
    mine = picked(found, section="check")
    names = list(dict.fromkeys(one.row.rule for one in mine))
    columns = works(mine)
    rows = []
    for name in names:
        cells = {one.row.work: one.row for one in picked(mine, rule=name)}
        rows.append(
            (
                name,
                *(number(cells[w].value, cells[w].unit) for w in columns if w in cells),
            )
        )
    text = (
        "Once per rule and signature. A time with a million numbers is a multiple of "
        "one fwd + bwd by hand; `python -m tests.benchmarks.cost` has more.\n"
    )
    return section(
        "The check of a first call", text, table(("operator", *columns), rows)
    )


def plots(pictures: Sequence[Picture]) -> str:
    """Return the pictures."""
    body = "\n".join(
        f"![{one.caption}](performance/{one.file})\n\n{one.caption}\n"
        for one in pictures
    )
    return section("Plots", "", body)


def summary(rows: Sequence[Row]) -> str:
    """Return the rows of a run for a terminal."""
    lines = []
    for row in rows:
        if row.bar is None and row.rule != MEAN:
            continue
        mark = "" if row.bar is None else ("met" if row.is_met else "MISSED")
        bar = "" if row.bar is None else f"<= {number(row.bar, row.unit)}"
        what = f"{row.work}, {row.rule}" if row.rule else row.work
        beside = (
            f"{row.contender} / {row.reference}" if row.reference else row.contender
        )
        lines.append(
            f"{what:<62} {beside:<40} {with_interval(row):>22} {bar:>10} {mark}"
        )
    return "\n".join(lines)

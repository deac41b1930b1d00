"""What a rule costs beside the same rule by hand, and the page that says so.

``python -m tests.benchmarks.performance [--quick] [--only SECTION] [--device cuda]``

Every section is measured in this process, contenders in turns; what needs a process of
its own starts one. The figures go to ``docs/performance/runs``, one file for each run,
and ``docs/performance.md`` is written from all of them. ``--quick`` shows in a minute
that everything works, and writes to ``out`` instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import (
    compiled,
    curvature,
    first_check,
    instructions,
    jax_twin,
    kept,
    ledger,
    meta_step,
    page,
    plots,
    speed,
    start,
    timing,
)
from tests.benchmarks.ledger import Part
from tests.benchmarks.speed import Effort

Section = Callable[[], Part | str]


def sections(effort: Effort, is_quick: bool) -> dict[str, Section]:
    """Return what can be measured, in an order in which nothing disturbs the next."""
    here = effort.device
    on_cpu: dict[str, Section] = {
        "start": lambda: start.measure(3 if is_quick else 11),
        "check": lambda: first_check.measure(*((4, 1) if is_quick else (6, 3))),
        "instructions": lambda: (
            "a quick run leaves valgrind out" if is_quick else instructions.measure()
        ),
        "jax": lambda: jax_twin.measure(effort, is_quick),
    }
    anywhere: dict[str, Section] = {
        "speed": lambda: speed.measure(effort),
        "vmap": lambda: speed.measure_vmap(effort),
        "second order": lambda: curvature.measure(effort, is_quick),
        "memory": lambda: kept.measure(here, 3 if is_quick else kept.LAYERS),
        "triton": lambda: triton(effort),
        # Dynamo, once it is imported, is in the way of every call: it comes late.
        "compiled": lambda: compiled.measure(effort, is_quick),
        "MAML": lambda: meta_step.measure(effort),
    }
    names = (
        "start",
        "speed",
        "vmap",
        "second order",
        "memory",
        "check",
        "instructions",
        "triton",
        "compiled",
        "MAML",
        "jax",
    )
    able = anywhere if here == "cuda" else {**on_cpu, **anywhere}
    return {name: able[name] for name in names if name in able}


def triton(effort: Effort) -> Part | str:
    """Measure kernels in Triton under a rule, or say what they lack."""
    if not torch.cuda.is_available():
        return "there is no CUDA"
    if effort.device != "cuda":
        return "it needs --device cuda"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from tests.benchmarks import fused_softmax  # imports triton

    return fused_softmax.measure(effort)


def measured(name: str, section: Section) -> Part:
    """Measure a section and print what it found, or why it found nothing."""
    begin = time.perf_counter()
    found = section()
    seconds = time.perf_counter() - begin
    if isinstance(found, str):
        print(f"\n== {name}: not measured, {found}", flush=True)
        return Part([])
    print(f"\n== {name}, {seconds:.0f} s\n{page.summary(found.rows)}", flush=True)
    return found


def publish(folder: Path) -> None:
    """Write the page and its pictures from all runs that are stored."""
    runs = ledger.load(folder / "performance" / "runs")
    pictures = {}
    for device in dict.fromkeys(run.device for run in runs):
        curves = plots.curves_of([run for run in runs if run.device == device])
        suffix = "" if device == "cpu" else f"-{device}"
        # Without matplotlib the tables are still worth having.
        with contextlib.suppress(ImportError):
            pictures[device] = plots.draw(curves, folder / "performance", suffix)
    text = page.write(runs, pictures)
    (folder / "performance.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", metavar="SECTION", action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--into", type=Path, help="a folder; docs, or out if quick")
    parser.add_argument("--page", action="store_true", help="write it, measure nothing")
    options = parser.parse_args()
    folder = options.into or Path("out" if options.quick else "docs")
    if options.page:
        publish(folder)
        return
    torch.set_num_threads(1)
    timing.keep_memory()
    effort = Effort.quick(options.device) if options.quick else Effort(options.device)
    able = sections(effort, options.quick)
    if unknown := set(options.only or ()) - set(able):
        parser.error(f"{', '.join(unknown)} is not among {', '.join(able)}")
    parts = [
        measured(name, section)
        for name, section in able.items()
        if not options.only or name in options.only
    ]
    if not any(part.rows for part in parts):
        return
    run = ledger.store(options.device, parts, folder / "performance" / "runs")
    publish(folder)
    print(f"\nrun {run.name}; the page is {folder / 'performance.md'}")


if __name__ == "__main__":
    main()

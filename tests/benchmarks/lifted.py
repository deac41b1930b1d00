"""Function classes of other libraries, before and after ``lift``.

``python -m tests.benchmarks.lifted`` runs every class of :mod:`.neighbours` in a
process of its own and writes the table into ``docs/guides/functions.md``.
``--device cuda`` is
for Liger-Kernel; ``--only TEXT`` for some classes; ``--dry`` writes nothing.

The references do not use gradtools: the class's own backward, a loop for vmap, the
transpose of its backward for jvp, differences of its gradient for double backward.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import gradtools as gt
from tests.benchmarks.neighbours import Case

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "functions.md"
MODULES = {  # library: (the module here, the device it wants)
    "linear_operator": ("gaussian_processes", "cpu"),
    "gpytorch": ("gaussian_processes", "cpu"),
    "torchdiffeq": ("differential_equations", "cpu"),
    "liger_kernel": ("liger", "cuda"),
}
LIGER = "liger_kernel"
RIGHT = "right"
PROCESSES = multiprocessing.get_context("forkserver")  # one import of torch for all
PROCESSES.set_forkserver_preload(["torch._dynamo", "gradtools"])


class Wrong(Exception):
    """A number differs from the reference; torch said nothing."""


class Undefined(Exception):
    """There is no reference: the class's gradient is no derivative to begin with."""


# One class.


class Subject:
    """A case and the references for it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.places = [
            place
            for place, arg in enumerate(case.args)
            if isinstance(arg, torch.Tensor) and arg.requires_grad
        ]
        self.leaves = [case.args[place] for place in self.places]
        self.directions = [
            self.like_symmetric(leaf, self.pattern(leaf, 91)) for leaf in self.leaves
        ]
        self.is_double = all(leaf.dtype == torch.float64 for leaf in self.leaves)
        self.is_surrogate = isinstance(case.options.get("contract"), gt.Surrogate)

    def pattern(self, like: torch.Tensor, shift: int) -> torch.Tensor:
        """Return weights between 0.5 and 1.5, the same for the same shape and shift."""
        places = torch.arange(like.numel(), device=like.device, dtype=like.dtype)
        return (1 + 0.5 * torch.sin(1.7 * places + shift)).reshape(like.shape)

    def like_symmetric(
        self, leaf: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        """Keep a symmetric matrix one: its class reads a half of it, or either."""
        bare = leaf.detach()
        is_square = bare.dim() == 2 and bare.shape[0] == bare.shape[1]
        if is_square and torch.allclose(bare, bare.mT):
            return (direction + direction.mT) / 2
        return direction

    def outs(self, apply: Callable[..., Any], values: Sequence[Any]) -> list[Any]:
        """Return the differentiable outputs; what is random draws the same again."""
        args = list(self.case.args)
        for place, value in zip(self.places, values, strict=True):
            args[place] = value
        if not torch.compiler.is_compiling():
            torch.manual_seed(0)
        out = apply(*args)
        out = out if isinstance(out, tuple) else (out,)
        return [
            t for t in out if isinstance(t, torch.Tensor) and t.dtype.is_floating_point
        ]

    def loss(self, apply: Callable[..., Any], values: Sequence[Any]) -> torch.Tensor:
        """Return a number that is no linear function of the outputs."""
        outs = self.outs(apply, values)
        terms = [
            (self.pattern(o, i) * o + 0.1 * o * o).sum() for i, o in enumerate(outs)
        ]
        return torch.stack([term.to(torch.float64) for term in terms]).sum()

    def gradient(
        self, apply: Callable[..., Any], leaves: Sequence[Any], **options: Any
    ) -> list[torch.Tensor]:
        """Return the gradient of the loss; zeros where there is none."""
        with self.put_back():
            found = torch.autograd.grad(
                self.loss(apply, leaves), leaves, allow_unused=True, **options
            )
            return [
                torch.zeros_like(leaf) if g is None else g.clone()
                for g, leaf in zip(found, leaves, strict=True)
            ]

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Let a class write over its arguments; nobody after it sees that.

        Its gradient may stand where an argument stood: clone it inside.
        """
        before = [leaf.detach().clone() for leaf in self.leaves]
        try:
            yield
        finally:
            for leaf, value in zip(self.leaves, before, strict=True):
                leaf.data.copy_(value)  # behind torch's back too: it may be saved

    def bare(self) -> list[torch.Tensor]:
        """Return copies of the leaves that need no gradient."""
        return [leaf.detach().clone() for leaf in self.leaves]

    @contextlib.contextmanager
    def moved(self, step: float) -> Iterator[None]:
        """Move the leaves along a direction, and back: a module may hold them too."""
        before = [leaf.detach().clone() for leaf in self.leaves]
        with torch.no_grad():
            for leaf, direction in zip(self.leaves, self.directions, strict=True):
                leaf.add_(step * direction)
        try:
            yield
        finally:
            with torch.no_grad():
                for leaf, value in zip(self.leaves, before, strict=True):
                    leaf.copy_(value)

    def agree(self, got: Any, wanted: Any, *, by_differences: bool = False) -> None:
        """Raise where the two differ by more than rounding."""
        tolerance = 1e-7 if self.is_double else 2e-3
        if by_differences:
            tolerance = 1e-4 if self.is_double else 5e-2
        for value, reference in zip(got, wanted, strict=True):
            size = reference.abs().max().item() if reference.numel() else 0.0
            gap = (value - reference).abs().max().item() if reference.numel() else 0.0
            if not gap <= tolerance * max(size, 1e-3):
                raise Wrong(f"off by {gap / max(size, 1e-3):.1e} of its size")


def backward(subject: Subject, apply: Any) -> None:
    """Compare with the class."""
    wanted = subject.gradient(subject.case.function.apply, subject.leaves)
    subject.agree(subject.gradient(apply, subject.leaves), wanted)


def functional(subject: Subject, apply: Any) -> None:
    """The same by torch.func."""
    wanted = subject.gradient(subject.case.function.apply, subject.leaves)
    bare = subject.bare()
    places = tuple(range(len(bare)))
    got = torch.func.grad(lambda *v: subject.loss(apply, v), places)(*bare)
    subject.agree(got, wanted)


def vmap(subject: Subject, apply: Any) -> None:
    """Compare a batch over the first argument with a loop."""
    first, *rest = subject.bare()
    batch = torch.stack([first, first * 1.01])
    one = subject.case.function.apply
    with torch.no_grad():
        rows = [subject.outs(one, [x.clone(), *rest]) for x in batch]
        got = torch.func.vmap(
            lambda x: subject.outs(apply, [x, *rest]), randomness="same"
        )(batch)
    wanted = [torch.stack(column) for column in zip(*rows, strict=True)]
    subject.agree(got, wanted)


def jvp(subject: Subject, apply: Any) -> None:
    """Compare with the transpose of the class's backward: <g, v>."""
    bare = subject.bare()
    moves = [subject.pattern(leaf, 92) for leaf in bare]
    gradient = subject.gradient(subject.case.function.apply, subject.leaves)
    wanted = sum((g * v).sum().double() for g, v in zip(gradient, moves, strict=True))
    _, got = torch.func.jvp(
        lambda *v: subject.loss(apply, v), tuple(bare), tuple(moves)
    )
    subject.agree([got], [wanted])


def double_backward(subject: Subject, apply: Any) -> None:
    """Compare with differences of the gradient that the class gives.

    Where the class's gradient is no derivative, what the derivative of it would be is
    a matter of taste: a difference is called undefined then, not wrong.
    """

    def along(function: Any, step: float) -> torch.Tensor:
        with subject.moved(step):
            gradient = subject.gradient(function, subject.leaves)
        return total([g.detach() for g in gradient], 93)

    def second(function: Any) -> torch.Tensor:
        leaves = subject.leaves
        gradient = subject.gradient(function, leaves, create_graph=True)
        found = torch.autograd.grad(total(gradient, 93), leaves, allow_unused=True)
        pairs = zip(found, subject.directions, strict=True)
        terms = [(h * d).sum().double() for h, d in pairs if h is not None]
        return torch.stack(terms).sum()

    def total(values: Sequence[torch.Tensor], shift: int) -> torch.Tensor:
        terms = [(v.double() * subject.pattern(v, shift)).sum() for v in values]
        return torch.stack(terms).sum()

    one = subject.case.function.apply
    step = 1e-5 if subject.is_double else 1e-2
    wanted = (along(one, step) - along(one, -step)) / (2 * step)
    size, got = along(one, 0.0).abs(), second(apply)
    try:
        subject.agree([got / size], [wanted / size], by_differences=True)
    except Wrong:
        if not subject.is_surrogate:
            raise
        raise Undefined from None


def compiled(subject: Subject, apply: Any) -> None:
    """Compile the class as part of one graph, and compare with it."""
    run = torch.compile(
        lambda *v: subject.loss(apply, v), backend="aot_eager", fullgraph=True
    )
    wanted = subject.gradient(subject.case.function.apply, subject.leaves)
    with subject.put_back():
        found = torch.autograd.grad(
            run(*subject.leaves), subject.leaves, allow_unused=True
        )
        got = [
            torch.zeros_like(leaf) if g is None else g.clone()
            for g, leaf in zip(found, subject.leaves, strict=True)
        ]
    subject.agree(got, wanted)


USES: dict[str, Callable[[Subject, Any], None]] = {
    "backward": backward,
    "grad": functional,
    "vmap": vmap,
    "jvp": jvp,
    "double backward": double_backward,
    "compile": compiled,
}


def outcome(use: Callable[[Subject, Any], None], subject: Subject, apply: Any) -> str:
    """Run one use; return what came of it in a few words."""
    try:
        use(subject, apply)
    except Wrong as error:
        return f"wrong: {error}"
    except Undefined:
        return "undefined: the class's gradient is no derivative"
    except Exception as error:
        # Dynamo makes an error of its own of what is raised inside.
        name = type(error).__name__
        return f"{name}: {str(error).strip().partition(chr(10))[0][:160]}"
    return RIGHT


def lifted_for(case: Case) -> tuple[Any, dict[str, Any], str]:
    """Lift a class as its errors tell a user to; return options and what they said."""
    options, said = dict(case.options), []
    for _ in range(4):
        lifted = gt.lift(case.function, **options)
        try:
            backward(Subject(case), lifted)
        except Wrong:
            break
        except gt.GradtoolsError as error:
            said.append(str(error).partition("\n")[0])
            if (
                "edits_in_place" in (error.fix or "")
                and "edits_in_place" not in options
            ):
                options["edits_in_place"] = True
            elif isinstance(error, gt.GradientMismatchError) and (
                "contract" not in options
            ):
                options["contract"] = gt.Surrogate()
            else:
                break
        except Exception:
            break
        else:
            break
    return gt.lift(case.function, **options), options, "; ".join(said) or "passes"


def examined(case: Case) -> dict[str, Any]:
    """Return the row of a class."""
    lifted, options, said = lifted_for(case)
    case.options = options
    before = {
        name: outcome(use, Subject(case), case.function.apply)
        for name, use in USES.items()
    }
    after = {}
    for name, use in USES.items():
        after[name] = outcome(use, Subject(case), lifted)
        if after[name].startswith("TransformError") and "vmap" not in options:
            slow = gt.lift(case.function, **options, vmap="sequential")
            again = outcome(use, Subject(case), slow)
            if again == RIGHT:
                after[name] = f'{RIGHT}, with vmap="sequential"'
    return {
        "before": before,
        "after": after,
        "options": ", ".join(f"{key}={shown(value)}" for key, value in options.items()),
        "check": said,
    }


def shown(value: Any) -> str:
    """Return how an option is written."""
    return "Surrogate()" if isinstance(value, gt.Surrogate) else repr(value)


def needed(library: str, device: str) -> str | None:
    """Return why the classes of a library cannot run here, or None."""
    if importlib.util.find_spec(library) is None:
        return "not installed"
    if MODULES[library][1] == "cuda" and device != "cuda":
        return "needs a GPU"
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a GPU"
    return None


def maker_of(name: str, device: str) -> Callable[[], Case]:
    """Return what makes a case."""
    module, wants = MODULES[name.partition(" ")[0]]
    cases = importlib.import_module(f"tests.benchmarks.neighbours.{module}").CASES
    return (lambda: cases[name](device)) if wants == "cuda" else cases[name]


def row_here(name: str, device: str) -> dict[str, Any]:
    """Examine a class in this process."""
    warnings.simplefilter("ignore")
    try:
        return examined(maker_of(name, device)())
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:160]
        return {"failed": f"{type(error).__name__}: {text}"}


def send_row(name: str, device: str, end: Any) -> None:
    """Examine a class: what a process of its own does."""
    end.send(row_here(name, device))


# All of them.


def names_of(libraries: Sequence[str]) -> Iterator[str]:
    """Yield the names of all classes, also of what is not installed."""
    for library in libraries:
        path = Path(__file__).parent / "neighbours" / f"{MODULES[library][0]}.py"
        text = path.read_text()
        if library == LIGER:
            part = text[text.index("_CLASSES") :]
            found = [
                line.split('"')[1]
                for line in part.splitlines()
                if line.startswith('    "')
            ]
            yield from (f"{library} {name}" for name in found)
        else:
            part = text[text.index("CASES") :]
            quoted = (line.split('"')[1] for line in part.splitlines() if '":' in line)
            yield from (name for name in quoted if name.startswith(f"{library} "))


def row_of(name: str, device: str, seconds: float) -> dict[str, Any]:
    """Examine a class in a process of its own."""
    missing = needed(name.partition(" ")[0], device)
    if missing is not None:
        return {"failed": missing}
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=send_row, args=(name, device, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"failed": f"took more than {seconds:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def word(text: str) -> str:
    """Return what a cell says."""
    if text.startswith(RIGHT):
        return RIGHT + (" (sequential)" if "sequential" in text else "")
    if text.startswith("undefined"):
        return "undefined"
    return "**wrong**" if text.startswith("wrong") else "error"


def count(rows: dict[str, dict[str, Any]], when: str, use: str) -> int:
    """Return for how many classes a use is right."""
    return sum(row[when][use].startswith(RIGHT) for row in rows.values() if when in row)


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, and of what refuses."""
    ran = {name: row for name, row in rows.items() if "before" in row}
    yield "| class, before → lifted | " + " | ".join(USES) + " | options |"
    yield "|---" * (len(USES) + 2) + "|"
    for name, row in ran.items():
        cells = [
            f"{word(row['before'][use])} → {word(row['after'][use])}" for use in USES
        ]
        yield f"| {name} | " + " | ".join(cells) + f" | {row['options']} |"
    if ran:
        totals = [
            f"{count(ran, 'before', use)} → {count(ran, 'after', use)}" for use in USES
        ]
        yield f"| **right, of {len(ran)}** | " + " | ".join(totals) + " | |"
    yield ""
    for name, row in ran.items():
        said = [row["check"]] if row["check"] != "passes" else []
        for text, uses in itertools.groupby(
            sorted(USES, key=lambda use: row["after"][use]),
            lambda use: row["after"][use],
        ):
            if not text.startswith(RIGHT):
                said.append(f"{', '.join(uses)}: {text}")
        if said:
            yield f"- {name}: " + "; ".join(said)
    waiting: dict[str, list[str]] = {}
    for name, row in rows.items():
        if "failed" in row:
            waiting.setdefault(row["failed"], []).append(name)
    for reason, which in waiting.items():
        yield f"- {reason}: {', '.join(which)}"


def write(lines: Sequence[str], device: str) -> None:
    """Put the lines between their marks on the page."""
    text = PAGE.read_text()
    begin, end = (
        f"<!-- lifted on {device}: begin -->",
        f"<!-- lifted on {device}: end -->",
    )
    head, rest = text.split(begin)
    PAGE.write_text(
        head + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    )


def main() -> None:
    """Run the classes that the device is for; write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--one", help="examine one class in this process")
    parser.add_argument("--only", default="", help="classes whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=240, help="for one class")
    parser.add_argument("--json", type=Path, help="where to put all that was found")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(row_here(given.one, given.device), indent=1))
        return
    libraries = [LIGER] if given.device == "cuda" else list(MODULES)
    names = [name for name in names_of(libraries) if given.only in name]
    rows: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        waiting = {
            pool.submit(row_of, name, given.device, given.seconds): name
            for name in names
        }
        for done in concurrent.futures.as_completed(waiting):
            name = waiting[done]
            rows[name] = row = done.result()
            shown = row.get("failed") or ", ".join(
                f"{use}: {word(row['before'][use])} -> {word(row['after'][use])}"
                for use in USES
            )
            print(f"{name}: {shown}", flush=True)
            if given.json:  # now, in case that the rest has no time
                given.json.write_text(json.dumps(rows, indent=1))
    rows = {name: rows[name] for name in names}
    lines = list(table(rows))
    print("\n".join(lines))
    if not given.dry:
        write(lines, given.device)


if __name__ == "__main__":
    main()

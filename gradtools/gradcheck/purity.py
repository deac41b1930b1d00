"""Whether the functions of a rule are functions: no edits in place, one answer.

torch gives no sign of either: an edit changes the user's data or somebody else's
gradient, and a bwd that draws random numbers differs from one call to the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools.errors import GradientMismatchError, Violation
from gradtools.gradcheck import numeric, probes
from gradtools.gradcheck.agreement import agreement
from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.subject import Optional, Run, Subject, Tensors, floats
from gradtools.gradcheck.surroundings import Unreachable

__all__ = ["First", "first_run"]


@dataclasses.dataclass(frozen=True)
class First:
    """What the first runs of a rule gave, at a probe.

    Attributes:
        run: What fwd returned.
        cotangents: Some for the floating outputs, drawn at random.
        values: What bwd returned for them, per leaf.
    """

    run: Run
    cotangents: Tensors
    values: Optional


def first_run(
    subject: Subject, probe: Probe, *, watch: bool = True
) -> tuple[First, list[Evidence]]:
    """Run fun once, fwd thrice, bwd twice; raise where they are not pure.

    Whether fwd agrees with fun is seen on the way, and tensors that reach fwd or bwd
    past the arguments are looked for as well, with ``watch``.
    """
    rule, paths = subject.rule, probe.paths
    fun_outs = _edited_as_stated(subject, probe)
    for tensor in filter(floats, (*fun_outs, *probe.leaves)):
        if tensor.dtype in _WITHOUT_ARITHMETIC:
            raise Unreachable(f"torch does not compute with {tensor.dtype}")
    watched = probe.watched(anew=watch)
    run = _unedited(subject, "fwd", lambda: subject.fwd(watched), probe.leaves, paths)
    if rule.fwd is not None or rule.bwd is None:
        again = subject.fwd(watched)
        if not _same((*run.outs, *run.new), (*again.outs, *again.new)):
            raise _irreproducible(subject, "fwd", None)
    agreed = agreement(subject, fun_outs, run.outs)
    cotangents = [numeric.signs(o, subject.generator) for o in run.outs if floats(o)]
    places = [f"residuals[{i}]" for i in range(len(run.kept))]
    places += [f"the cotangent of output {i}" for i in range(len(cotangents))]
    values = _unedited(
        subject,
        "bwd" if rule.bwd is not None else "jvp",
        lambda: subject.bwd(run, cotangents),
        (*run.kept, *cotangents),
        [*_names(run, paths), *places[len(run.kept) :]],
    )
    subject.is_settled = True
    _call_elsewhere(subject, run)
    other = subject.bwd(run, cotangents, anew=True)
    for path, one, two in zip(paths, values, other, strict=True):
        if not _same([one], [two]):
            subject.fwd(watched)
            third = subject.bwd(run, cotangents, anew=True)
            if _same(values, third):
                raise _past_the_residuals(subject, path)
            raise _irreproducible(subject, "bwd", path)
    edited = ", ".join(paths[place] for place in sorted(subject.edited))
    detail = f"fun edits {edited} in place" if edited else "nothing is edited in place"
    evidence = Evidence("pure", "passed", f"{detail}; one answer")
    run = dataclasses.replace(run, probe=probe)
    return First(run, cotangents, values), [agreed, evidence]


def _call_elsewhere(subject: Subject, run: Run) -> None:
    """Run fwd on other arguments: a bwd that is a function does not care.

    What fwd leaves in a global, in a closure or on an object is that of its last call.
    """
    every = [place for place, leaf in enumerate(run.probe.leaves) if floats(leaf)]
    near = probes.moved_off_kinks(run.probe, subject.generator, every)
    with contextlib.suppress(Exception):  # not every function takes what is near
        subject.fwd(near)


def _past_the_residuals(subject: Subject, path: str) -> GradientMismatchError:
    rule = subject.rule
    return GradientMismatchError(
        f"{rule.name}: what bwd returns for {path} depends on which call of fwd came "
        "last; something reaches it past the residuals",
        rule=rule.where,
        function=rule.which("bwd" if rule.bwd is not None else "jvp"),
        violations=[Violation(path, "the cotangent of the call itself", "another one")],
        fix="Return among the residuals what bwd needs, not in a global, a closure or "
        "an attribute: the next call overwrites it, and torch sees no edits of it.",
        kind="state",
    )


_WITHOUT_ARITHMETIC = (
    torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)  # fmt: skip


def _names(run: Run, paths: Sequence[str]) -> list[str]:
    """Name the kept tensors: arguments by their path, others by their place."""

    def name(position: int) -> str:
        source = run.layout.kept[position]
        if source.kind == "input":
            return paths[int(source.number)]
        what = " (an output)" if source.kind == "output" else ""
        return f"residual {position}{what}"

    return [name(position) for position in range(len(run.layout.kept))]


def _edited_as_stated(subject: Subject, probe: Probe) -> Tensors:
    """Run fun; raise if it edits what needs a gradient.

    What has none it may edit, as batch_norm does its statistics: that is what the
    function is, and fwd may do it too. Copies are made for it from then on.
    """
    places = probe.places
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in probe.leaves]
    rest = [i for i in range(len(copies)) if i not in places]
    outs = _unedited(
        subject,
        "fun",
        lambda: subject.fun(probe, copies),
        [copies[i] for i in places],
        [probe.paths[i] for i in places],
    )
    pairs = ((i, copies[i], probe.leaves[i]) for i in rest)
    subject.edited = frozenset(
        i
        for i, copy, leaf in pairs
        if isinstance(leaf, torch.Tensor) and not torch.equal(_bits(copy), _bits(leaf))
    )
    return outs


def _unedited(
    subject: Subject,
    role: str,
    function: Callable[[], Any],
    values: Sequence[Any],
    names: Sequence[str],
) -> Any:
    """Run a function; raise if it changes one of the values."""
    before = [
        (x, x._version, x.clone()) if isinstance(x, torch.Tensor) else None
        for x in values
    ]
    result = function()
    edited = [
        name
        for name, known in zip(names, before, strict=True)
        if known is not None and not _is_as_before(*known)
    ]
    if not edited:
        return result
    rule = subject.rule
    raise GradientMismatchError(
        f"{rule.name}: {role} changes {', '.join(edited)} in place",
        rule=rule.where,
        function=rule.which(role),
        violations=[
            Violation(name, "a tensor left as it is", "one with other numbers")
            for name in edited
        ],
        fix=f"Let it work on copies: lift({rule.name}, edits_in_place=True)."
        if rule.is_lifted
        else "Compute a new tensor: x.relu() for x.relu_(), x * 2 for x.mul_(2), "
        "torch.where for an assignment under a mask.",
        kind="in place",
    )


def _is_as_before(tensor: torch.Tensor, version: int, value: torch.Tensor) -> bool:
    return tensor._version == version and torch.equal(_bits(tensor), _bits(value))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, in which NaN is NaN, whatever its dtype."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.flatten().contiguous().view(torch.uint8)


def _same(first: Optional, second: Optional) -> bool:
    """Whether two answers are one, up to the order of additions on a GPU."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.shape != b.shape or not _near(numeric.dense(a), numeric.dense(b)):
            return False
    return True


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    if torch.equal(a, b):
        return True
    if not floats(a):
        return False
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    gap, size = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(b)
    return bool(gap <= torch.finfo(a.dtype).eps ** 0.75 * size)


def _irreproducible(
    subject: Subject, role: str, path: str | None
) -> GradientMismatchError:
    rule = subject.rule
    what = "" if path is None else f" for {path}"
    given = getattr(rule, role)
    if role == "bwd" and given is None:
        role = "jvp"
    return GradientMismatchError(
        f"{rule.name}: {role} does not give the same answer twice{what}; it draws "
        "random numbers of its own, or keeps a state",
        rule=rule.where,
        function=rule.which(role if getattr(rule, role) is not None else "fun"),
        violations=[]
        if path is None
        else [Violation(path, "the same cotangent for the same call", "another one")],
        fix="Draw random numbers in fwd, from torch's global generators, and keep what "
        "was drawn among the residuals; keep no state between calls.",
        kind="random",
    )

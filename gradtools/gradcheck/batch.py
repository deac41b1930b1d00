"""Whether a batch gives what its elements give, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gradtools.errors import (
    GradientMismatchError,
    GradtoolsError,
    TransformError,
    Violation,
)
from gradtools.gradcheck import numeric, probes
from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.subject import Subject, floats, spread
from gradtools.gradcheck.trial import filled
from gradtools.lowering import batching
from gradtools.rules.rule import Rule

__all__ = ["batch", "of_patterns", "pattern_in_words"]

MOST = 3  # elements; with two, a swap of the two could be told from nothing else


def pattern_in_words(batched: Any) -> str:
    """Say which arguments carry a batch dimension, and where."""
    names = batched.signature.names
    parts = []
    for dims in batched.pattern:
        if len(dims) != len(names):
            names = [path.removeprefix("args.") for path in batched.signature.paths()]
        shown = (
            f"{n} (dim {d})" for n, d in zip(names, dims, strict=True) if d is not None
        )
        parts.append(", ".join(shown) or "nothing")
    return " and over ".join(parts)


class _Info(NamedTuple):
    """What torch tells a vmap rule of a batch."""

    batch_size: int
    randomness: str


def of_patterns(subject: Subject, probe: Probe) -> list[Evidence]:
    """Batch all arguments, and the first alone; raise where a batch is not a loop."""
    tensors = [i for i, x in enumerate(probe.leaves) if isinstance(x, torch.Tensor)]
    patterns, evidence = [tensors, probe.places[:1]], []
    for places in patterns[: 1 + (patterns[1] != tensors)]:
        if not places:
            continue
        near = (
            probes.moved_off_kinks(probe, subject.generator) for _ in range(MOST - 1)
        )
        rows = [probe.leaves, *(other.leaves for other in near)]
        leaves = [
            torch.stack([row[i] for row in rows]) if i in places else leaf
            for i, leaf in enumerate(probe.leaves)
        ]
        dims = [0 if i in places else None for i in range(len(leaves))]
        batched = batching.batch(probe.plan, dims, _Info(MOST, "different"))
        try:
            evidence += batch(subject, batched, leaves)
        except GradtoolsError as error:
            if not isinstance(error, TransformError):
                raise
            evidence.append(_not_given(batched, error.what))
        except Exception as error:  # a branch on a value, say: vmap cannot serve it
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            evidence.append(_not_given(batched, reason))
    return evidence


def _not_given(batched: Any, reason: str) -> Evidence:
    return Evidence(f"vmap over {pattern_in_words(batched)}", "not given", reason)


def batch(subject: Subject, batched: Any, leaves: Sequence[Any]) -> list[Evidence]:
    """Run some elements of a batch together and apart; raise where this differs.

    Args:
        subject: The rule.
        batched: The batched plan.
        leaves: Its leaves, plain.
    """
    batched, leaves = batched.narrowed(MOST, leaves)
    state = subject.randomness
    with state.rewound():
        outs, new, layout = batched.forward(leaves)
        draws = not state.is_untouched()
    subject.evaluations += 1
    kept = layout.pick(leaves, outs, new)
    out_dims, kept_dims = layout.out_dims, layout.kept_dims
    given = [numeric.signs(out, subject.generator) for out in outs if floats(out)]
    cotangents = spread(outs, given)
    needs = [meta is not None for meta in batched.signature.metas]
    question = f"vmap over {pattern_in_words(batched)}"
    values: Sequence[Any] = [None] * len(needs)
    is_reversed = bool(given) and not batched.primal
    if is_reversed:
        values = batched.backward(layout, kept, cotangents, needs)
    rows = []
    for index in range(batched.size):
        element = batched.element(leaves, index)
        subject.evaluations += 2
        alone = None if draws else batched.inner.forward(element)
        at = [_at(k, dim, index) for k, dim in zip(kept, kept_dims, strict=True)]
        each = [_at(c, dim, index) for c, dim in zip(cotangents, out_dims, strict=True)]
        # what is not batched in the output has a cotangent in every element
        each = [
            c if dim is not None or c is None else c / batched.size
            for c, dim in zip(each, out_dims, strict=True)
        ]
        layout_here = layout.inner
        if alone is not None:
            outs_here, new_here, layout_here = alone
            _compare_outputs(batched, question, index, outs, out_dims, outs_here)
            at = layout_here.pick(element, outs_here, new_here)
        if is_reversed:
            rows.append(batched.inner.backward(layout_here, at, each, needs))
    _compare_cotangents(subject.rule, question, batched, values, rows)
    detail = f"as a loop over {batched.size} elements"
    detail += ", fwd apart: it draws random numbers" if draws else ""
    return [Evidence(question, "passed", detail)]


def _at(value: torch.Tensor | None, dim: int | None, index: int) -> Any:
    return value if value is None or dim is None else value.select(dim, index)


def _compare_outputs(
    batched: Any,
    question: str,
    index: int,
    outs: Sequence[torch.Tensor],
    dims: Sequence[int | None],
    alone: Sequence[torch.Tensor],
) -> None:
    rule = batched.rule
    role = "fwd" if rule.fwd is not None and not batched.primal else "fun"
    if batched.primal and rule.vmap_rule is not None:
        role = "vmap_rule"
    for number, (out, dim, want) in enumerate(zip(outs, dims, alone, strict=True)):
        got = _at(out, dim, index)
        if rule.is_lifted and floats(got) and not floats(want):
            want = _of_bits(want, got.dtype)  # noqa: PLW2901
        if not _near(got, want):
            raise _wrong(rule, role, f"output {number}", question, want, got)


def _of_bits(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of an output that a lifted class marks non-differentiable."""
    if dtype.is_complex:
        return torch.view_as_complex(tensor.view(dtype.to_real()))
    return tensor.view(dtype)


def _compare_cotangents(
    rule: Rule,
    question: str,
    batched: Any,
    values: Sequence[torch.Tensor | None],
    rows: Sequence[Sequence[torch.Tensor | None]],
) -> None:
    paths = batched.signature.paths()
    for place, path in enumerate(paths):
        value, dim = values[place], batched.in_dims[place]
        column = [row[place] for row in rows]
        if value is None and all(entry is None for entry in column):
            continue
        like = next(t for t in (*column, value) if t is not None)
        if dim is None:
            want = torch.stack([filled(c, like) for c in column]).sum(0)
            got = filled(value, want)
            if not _near(got, want):
                raise _wrong(rule, "bwd", path, question, want, got)
            continue
        for index, entry in enumerate(column):
            got = _at(value, dim, index)
            if got is None and entry is None:
                continue
            want = filled(entry, like if got is None else got)
            got = filled(got, want)
            if not _near(got, want):
                raise _wrong(rule, "bwd", path, question, want, got)


def _near(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not floats(got):
        return torch.equal(got, want)
    got, want = torch.nan_to_num(got), torch.nan_to_num(want)
    tolerance = 30 * torch.finfo(got.dtype).eps ** 0.75
    gap = torch.linalg.vector_norm(got - want)
    return bool(gap <= tolerance * torch.linalg.vector_norm(want) + 1e-30)


def _wrong(
    rule: Rule,
    role: str,
    path: str,
    question: str,
    want: torch.Tensor,
    got: torch.Tensor,
) -> GradientMismatchError:
    expected, found = f"a tensor of shape {tuple(want.shape)}", str(tuple(got.shape))
    if want.shape == got.shape:
        place = int(torch.nan_to_num((got - want).abs().double()).argmax())
        expected = f"{want.flatten()[place].item():.6g} at its worst element"
        found = f"{got.flatten()[place].item():.6g}"
    fix = (
        "Return for every element of the batch what the function returns for it alone."
        if role == "vmap_rule"
        else f'Keep every element to itself in {role}, or use vmap="sequential" in the '
        f"place of {rule.vmap!r}."
    )
    return GradientMismatchError(
        f"{rule.name}: under {question}, {role} gives {path} something else than the "
        "elements of the batch do one by one; it mixes the batch",
        rule=rule.where,
        function=rule.which(role),
        violations=[Violation(path, expected, found)],
        fix=fix,
        kind="batch",
    )

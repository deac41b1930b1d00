"""The inputs on which a rule is checked.

The user's own arguments, in float64, moved off the exact kinks (a zero under relu, a
tie under max); smaller ones of the same kind where these are too big; and where a trace
has no values, numbers that are made up from the shapes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import DefinitionError, Violation
from gradtools.lowering.flat import Plan
from gradtools.lowering.state import State
from gradtools.rules.signature import (
    CallSignature,
    Meta,
    flatten_entries,
    is_differentiable,
)

__all__ = [
    "Probe",
    "Remembered",
    "given",
    "in_double",
    "invented",
    "made_up",
    "moved_off_kinks",
    "of_call",
    "scale_of",
    "scaled",
    "smaller",
]

WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
MOST_REMEMBERED = 2**16


@dataclasses.dataclass(frozen=True)
class Probe:
    """A plan and the leaves to run it on."""

    plan: Plan
    leaves: tuple[Any, ...]

    @property
    def places(self) -> list[int]:
        """The leaves whose derivative is claimed and wanted."""
        needs = self.plan.signature.needs
        return [
            i for i, meta in enumerate(self.plan.signature.metas) if meta and needs[i]
        ]

    @property
    def paths(self) -> list[str]:
        """The key path of every leaf."""
        return self.plan.signature.paths()

    def with_leaves(self, leaves: Sequence[Any]) -> Probe:
        """Return the probe on other leaves of the same structure."""
        old = self.plan.signature
        entries = tuple(old.entries(leaves))
        signature = CallSignature(old.parameters, entries, leaves, old.spec, old.needs)
        return Probe(
            dataclasses.replace(
                self.plan, signature=signature, autocast=(), checks=None
            ),
            tuple(leaves),
        )

    def replaced(self, values: dict[int, torch.Tensor]) -> Probe:
        """Return the probe with other tensors in some places."""
        return self.with_leaves([values.get(i, x) for i, x in enumerate(self.leaves)])

    def watched(self, *, anew: bool) -> Probe:
        """Return the probe with captured tensors looked for (again), or not."""
        state = State() if anew else State(watched={"fwd", "bwd", "jvp"})
        return Probe(dataclasses.replace(self.plan, state=state), self.leaves)


def of_call(plan: Plan, leaves: Sequence[Any]) -> Probe:
    """Return the probe that the arguments of a call are."""
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
    return Probe(plan, ()).with_leaves(plain)


def given(plan: Plan) -> Probe:
    """Return the probe that the user's ``probe=`` gives."""
    rule = plan.rule
    assert rule.probe is not None
    values = rule.probe()
    values = values if isinstance(values, tuple) else (values,)
    try:
        entries = rule.parameters.bind(values, {})
    except TypeError as error:
        raise DefinitionError(
            f"{rule.name}: probe= does not return the arguments of the function",
            rule=rule.where,
            violations=[
                Violation(
                    "probe()",
                    f"a tuple of arguments for {rule.parameters.signature}",
                    f"{len(values)} values: {error}",
                )
            ],
            fix="Return the tuple of arguments to check on.",
        ) from None
    leaves, spec = flatten_entries(entries)
    needs = tuple(map(is_differentiable, leaves))
    signature = CallSignature(rule.parameters, entries, leaves, spec, needs)
    return of_call(dataclasses.replace(plan, signature=signature), leaves)


def in_double(probe: Probe) -> Probe:
    """Return the probe with its floating tensors in double precision."""
    return probe.with_leaves(
        [
            leaf.detach().to(WIDER.get(leaf.dtype, leaf.dtype), copy=True)
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in probe.leaves
        ]
    )


def moved_off_kinks(
    probe: Probe, generator: torch.Generator, places: Iterable[int] | None = None
) -> Probe:
    """Return the probe with every number moved by some 0.1 permille.

    Args:
        probe: The probe.
        generator: Where the moves are drawn from.
        places: Which leaves to move: by default those that need a gradient.
    """
    moved = {}
    for place in probe.places if places is None else places:
        leaf = probe.leaves[place]
        noise = torch.rand(
            leaf.shape,
            generator=generator,
            dtype=torch.float64,
            device=generator.device,
        )
        step = (noise.to(leaf.device) + 0.5) * 1e-4
        size = leaf.abs() + 1e-2 * scale_of(leaf)
        moved[place] = leaf + (step * size).to(leaf.dtype)
    return probe.replaced(moved)


def scaled(probe: Probe, factor: float) -> Probe:
    """Return the probe with every differentiable number multiplied."""
    return probe.replaced({i: probe.leaves[i] * factor for i in probe.places})


def scale_of(tensor: torch.Tensor) -> float:
    """Return the root mean square of a tensor, 1 where that says nothing."""
    if tensor.numel() == 0:
        return 1.0
    norm = torch.linalg.vector_norm(tensor, dtype=WIDER.get(tensor.dtype)).item()
    scale = norm / tensor.numel() ** 0.5
    return scale if 0 < scale < float("inf") else 1.0


def smaller(probe: Probe, most: int) -> Probe | None:
    """Return the probe with its largest dimensions cut; None if that is not enough.

    Equal sizes stay equal. Indices in integer tensors are brought into range.
    """
    tensors = [leaf for leaf in probe.leaves if isinstance(leaf, torch.Tensor)]
    longest = max((size for t in tensors for size in t.shape), default=0)
    cap = 1 << max(longest.bit_length() - 1, 0)
    while cap > 1 and sum(_cut_size(tensor, cap) for tensor in tensors) > most:
        cap //= 2
    if cap <= 1:
        return None
    return probe.with_leaves(
        [_cut(x, cap) if isinstance(x, torch.Tensor) else x for x in probe.leaves]
    )


def _cut_size(tensor: torch.Tensor, cap: int) -> int:
    return torch.Size(min(size, cap) for size in tensor.shape).numel()


def _cut(tensor: torch.Tensor, cap: int) -> torch.Tensor:
    part = tensor[tuple(slice(0, cap) for _ in tensor.shape)].clone()
    if part.is_floating_point() or part.is_complex() or part.dtype == torch.bool:
        return part
    return torch.where(part >= cap, part % cap, part)


class Remembered:
    """The arguments of a call, for later; large ones in part.

    Of a tensor with many numbers the first are kept and repeated. Other objects are not
    kept alive.

    Attributes:
        is_whole: Nothing is in part.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.keepers = [_remembered(leaf) for leaf in leaves]
        self.absent = [leaf is None for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.is_whole = all(t.numel() <= MOST_REMEMBERED for t in tensors)

    def recall(self) -> list[Any] | None:
        """Return the arguments; None when one of them is no more."""
        values = [keeper() for keeper in self.keepers]
        pairs = zip(values, self.absent, strict=True)
        gone = any(value is None and not absent for value, absent in pairs)
        return None if gone else values


def _remembered(leaf: Any) -> Callable[[], Any]:
    if not isinstance(leaf, torch.Tensor):
        try:
            return weakref.ref(leaf)
        except TypeError:  # numbers, strings and the like
            return lambda: leaf
    if leaf.numel() <= MOST_REMEMBERED:
        copy = leaf.detach().clone()
        return lambda: copy
    shape, count = leaf.shape, leaf.numel()
    part = leaf.detach().flatten()[:MOST_REMEMBERED].clone()
    return lambda: part.repeat(-(-count // len(part)))[:count].reshape(shape)


def invented(plan: Plan, leaves: Sequence[Any]) -> Iterator[Probe]:
    """Yield probes for a call that has no values: made up, or the user's own."""
    if plan.rule.probe is not None:
        yield given(plan)
        return
    earlier = plan.state.remembered and plan.state.remembered.recall()
    if earlier is not None:
        yield of_call(plan, earlier)
        return
    yield of_call(plan, made_up(leaves))
    yield of_call(plan, made_up(leaves, positive=True))


def made_up(leaves: Sequence[Any], *, positive: bool = False) -> list[Any]:
    """Return the leaves of a trace with values.

    Args:
        leaves: Tensors without, and other objects.
        positive: Draw from 0.05 to 0.95, for logarithms and probabilities.
    """
    generator = torch.Generator().manual_seed(0)
    return [_made_up(leaf, positive, generator) for leaf in leaves]


def _made_up(leaf: Any, positive: bool, generator: torch.Generator) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape, dtype, device = Meta.of(leaf)
    shape = [torch_compat.hint(size) for size in shape]
    if not is_differentiable(leaf):
        return torch.zeros(shape, dtype=dtype, device=device)
    draw = torch.rand if positive else torch.randn
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = draw(shape, generator=generator, dtype=wide, device=generator.device)
    if positive:
        values = 0.05 + 0.9 * values
    return values.to(device=device, dtype=dtype)

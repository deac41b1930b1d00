"""vmap: a plan and the batch dimensions of its leaves make a batched plan.

The batched plan is a plan like any other, on tensors with their batch dimensions in
sight, so every transform below vmap applies to it as well. What is an input, an output
or new among the residuals is found out inside the vectorized function: a weight that is
not batched stays so, through fwd and bwd.

Dimensions are those of the tensors without ``leading`` ones; see :class:`.Lowerable`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch

from gradtools import torch_compat, trees
from gradtools.errors import ForwardContractError, TransformError, Violation
from gradtools.lowering import captures, preconditions
from gradtools.lowering.contract import describe
from gradtools.lowering.flat import Lowerable, Optional, Plan, Tensors
from gradtools.lowering.residuals import Layout

__all__ = ["batch"]

Dims = Sequence[int | None]
Sizes = tuple[int, ...]
Flat = Callable[..., Sequence[Any]]


def batch(plan: Lowerable, in_dims: Dims, info: Any) -> Batched:
    """Return the plan vectorized over the given dimensions of its leaves."""
    if plan.rule.vmap_rule is not None and plan.primal:
        how: type[Batched] = Stated if isinstance(plan, Plan) else Vectorized
    else:
        how = _MODES[plan.rule.vmap]
    return how(plan, in_dims, info)


class BatchedLayout(Layout):
    """The layout of a batched call.

    Attributes:
        inner: The layout of one element, which the transforms above vmap are handed.
        out_dims: Batch dimension of each output tensor.
        new_dims: Batch dimension of each new residual tensor.
        kept_dims: Batch dimension of each kept tensor.
    """

    __slots__ = ("inner", "kept_dims", "new_dims", "out_dims")

    def __init__(self, inner: Layout, in_dims: Dims, dims: Dims) -> None:
        super().__init__(
            inner.outputs, inner.residuals, inner.kept, inner.slots, inner.floating
        )
        self.inner = inner
        self.opaque = inner.opaque
        self.rng = inner.rng
        count = inner.outputs.count
        self.out_dims = tuple(dims[:count])
        self.new_dims = tuple(dims[count:])
        self.kept_dims = tuple(self.pick(in_dims, self.out_dims, self.new_dims))


class Batched:
    """A plan with a batch dimension on some of its leaves; how, the subclasses say."""

    def __init__(self, inner: Lowerable, in_dims: Dims, info: Any) -> None:
        self.inner = inner
        self.in_dims = tuple(in_dims)
        self.info = info
        self.size: int = info.batch_size
        self.rule = inner.rule
        self.signature = inner.signature
        self.state = inner.state
        self.primal = inner.primal
        self.moving = inner.moving
        self.order = inner.order
        self.autocast = inner.autocast
        self.has_jvp = inner.has_jvp

    def map(
        self, function: Flat, args: Sequence[Any], dims: Dims, leading: Sizes
    ) -> tuple[Sequence[Any], Dims]:
        """Run a function of flat arguments on the batch; return results and dims.

        The function takes the argument ``leading`` of what it is to call.
        """
        raise NotImplementedError

    def first_use(self, leaves: Sequence[Any]) -> None:
        """Let the check run, on the first element of the batch and on the batch."""
        if self.size:
            self.inner.first_use(self.element(leaves, 0))
            self.inner.first_batch(self, leaves)

    def first_batch(self, batched: Any, leaves: Sequence[Any]) -> None:
        """Let the check run before the rule is trusted with a batch of batches."""
        self.inner.first_batch(batched, leaves)

    def first_derived(self, what: str) -> None:
        """Let the check run before "forward mode" or "second order" is trusted."""
        self.inner.first_derived(what)

    @property
    def pattern(self) -> tuple[Dims, ...]:
        """The batch dimensions of the leaves, those of the inner batch first."""
        return (*getattr(self.inner, "pattern", ()), self.in_dims)

    def narrowed(self, count: int, leaves: Sequence[Any]) -> tuple[Batched, list[Any]]:
        """Return the plan for the first elements of the batch; their leaves."""
        count = min(count, torch_compat.hint(self.size))
        batched = type(self)(
            self.inner, self.in_dims, self.info._replace(batch_size=count)
        )
        return batched, [
            leaf.narrow(dim, 0, count)
            if isinstance(leaf, torch.Tensor) and dim is not None
            else leaf
            for leaf, dim in zip(leaves, self.in_dims, strict=True)
        ]

    def element(self, leaves: Sequence[Any], index: int) -> list[Any]:
        """Return the leaves of one element of the batch."""
        return _element(leaves, self.in_dims, index)

    def forward(
        self, leaves: Sequence[Any], *, leading: Sizes = ()
    ) -> tuple[Tensors, Tensors, BatchedLayout]:
        """Run the inner forward on the batch."""
        layouts: list[Layout] = []

        def run(*leaves: Any, leading: Sizes) -> Sequence[Any]:
            outs, new, layout = self.inner.forward(leaves, leading=leading)
            layouts.append(layout)
            return (*outs, *new)

        tensors, dims = self.map(run, leaves, self.in_dims, leading)
        self.refuse_different(layouts)
        preconditions.refuse_hidden(self.rule, layouts[0])
        layout = BatchedLayout(layouts[0], self.in_dims, dims)
        count = layout.outputs.count
        return tensors[:count], tensors[count:], layout

    def backward(
        self,
        layout: BatchedLayout,
        kept: Tensors,
        cotangents: Optional,
        needs: Sequence[bool],
        *,
        leading: Sizes = (),
    ) -> Optional:
        """Run the inner backward on the batch; sum what belongs to all of it.

        The cotangent of an output that no batch dimension reaches belongs to all
        elements together: each gets its share of it.
        """
        count = len(kept)
        place = len(leading)
        shared = [
            _share(value, self.size, place) if dim is None else value
            for value, dim in zip(cotangents, layout.out_dims, strict=True)
        ]

        def run(*tensors: Any, leading: Sizes) -> Sequence[Any]:
            given = tensors[:count], tensors[count:]
            return self.inner.backward(layout.inner, *given, needs, leading=leading)

        kept_dims: Any = layout.kept_dims
        out_dims = [0 if dim is None else dim for dim in layout.out_dims]
        dims = (*kept_dims, *_where(shared, out_dims))
        values, value_dims = self.map(run, (*kept, *shared), dims, leading)
        return [
            _placed(value, dim, in_dim, self.size, place, reduce=True)
            for value, dim, in_dim in zip(values, value_dims, self.in_dims, strict=True)
        ]

    def jvp(
        self,
        layout: BatchedLayout,
        leaves: Sequence[Any],
        tangents: Optional,
        outs: Tensors,
        kept: Tensors = (),
        *,
        leading: Sizes = (),
    ) -> Optional:
        """Run the inner jvp rule on the batch."""
        parts = (leaves, tangents, outs, kept)
        ends = [*accumulate(map(len, parts), initial=0)]

        def run(*values: Any, leading: Sizes) -> Sequence[Any]:
            given = (values[a:b] for a, b in pairwise(ends))
            return self.inner.jvp(layout.inner, *given, leading=leading)

        moved, used = _where(tangents, self.in_dims), layout.kept_dims[: len(kept)]
        dims: Any = (*self.in_dims, *moved, *layout.out_dims, *used)
        found = self.map(run, tuple(chain(*parts)), dims, leading)
        return [
            _placed(value, dim, out_dim, self.size, len(leading), reduce=False)
            for value, dim, out_dim in zip(*found, layout.out_dims, strict=True)
        ]

    def refuse_different(self, layouts: Sequence[Layout]) -> None:
        """Raise where the elements of a batch came out with different non-tensors."""
        first = layouts[0]
        for layout in layouts[1:]:
            same = all(
                _same(a.constants, b.constants) and a.spec == b.spec
                for a, b in (
                    (first.outputs, layout.outputs),
                    (first.residuals, layout.residuals),
                )
            )
            if not same:
                raise TransformError(
                    f"{self.rule.name}: outputs or residuals that are no tensors "
                    "differ between the elements of a batch",
                    rule=self.rule.where,
                    function=self.rule.which("fwd"),
                    fix="Return what differs between elements as a tensor.",
                )


class Vectorized(Batched):
    """``vmap="auto"``: torch vectorizes the operations of fwd and bwd."""

    def map(
        self, function: Flat, args: Sequence[Any], dims: Dims, leading: Sizes
    ) -> tuple[Sequence[Any], Dims]:
        """Run the function under vmap."""
        run = functools.partial(function, leading=leading)
        return torch_compat.vmap_flat(run, dims, self.size, self.info.randomness)(*args)


class Looped(Batched):
    """``vmap="sequential"``: one element after the other."""

    def map(
        self, function: Flat, args: Sequence[Any], dims: Dims, leading: Sizes
    ) -> tuple[Sequence[Any], Dims]:
        """Run the function on each element and stack what it returns."""
        if self.size == 0:
            raise TransformError(
                f"{self.rule.name}: vmap over an empty batch needs one call to learn "
                'the shapes, and vmap="sequential" has no element to call with',
                rule=self.rule.where,
                fix="Leave out empty batches, or use another vmap mode.",
            )
        rows = [
            function(*_element(args, dims, index), leading=leading)
            for index in range(self.size)
        ]
        results = [_stacked(column) for column in zip(*rows, strict=True)]
        return results, [None if result is None else 0 for result in results]


class Expanded(Batched):
    """``"expand_dims"``, ``"broadcast_all"``: fwd and bwd take leading dimensions."""

    def map(
        self, function: Flat, args: Sequence[Any], dims: Dims, leading: Sizes
    ) -> tuple[Sequence[Any], Dims]:
        """Run the function once, with the batch dimension in front of every tensor."""
        place = len(leading)
        front = [
            self.to_front(arg, dim, place) if isinstance(arg, torch.Tensor) else arg
            for arg, dim in zip(args, dims, strict=True)
        ]
        results: list[Any] = []
        out_dims: list[int | None] = []
        for result in function(*front, leading=(*leading, self.size)):
            alone = result is None or self.size_at(result, place) != self.size
            results.append(
                result.squeeze(place) if alone and result is not None else result
            )
            out_dims.append(None if alone else 0)
        return results, out_dims

    def to_front(
        self, tensor: torch.Tensor, dim: int | None, place: int
    ) -> torch.Tensor:
        """Bring the batch dimension to ``place``; make one where there is none."""
        if dim is not None:
            return tensor.movedim(dim + place, place)
        tensor = tensor.unsqueeze(place)
        if self.rule.vmap == "broadcast_all":
            sizes = [-1] * tensor.dim()
            sizes[place] = self.size
            tensor = tensor.expand(sizes)
        return tensor

    def size_at(self, tensor: torch.Tensor, place: int) -> int:
        size = tensor.shape[place] if tensor.dim() > place else None
        if size not in (1, self.size):
            expected = (
                f"a dimension of size {self.size} (the batch) or 1 at position {place}"
            )
            raise ForwardContractError(
                f"{self.rule.name}: under vmap={self.rule.vmap!r} every tensor that "
                "fwd returns carries the batch dimension in front",
                rule=self.rule.where,
                function=self.rule.which("fwd"),
                violations=[Violation("return", expected, describe(tensor))],
                fix="Keep leading dimensions through fwd, or use another vmap mode.",
            )
        return size


class Stated(Batched):
    """``def_vmap``: the user's own rule, where no gradient is wanted."""

    def forward(
        self, leaves: Sequence[Any], *, leading: Sizes = ()
    ) -> tuple[Tensors, Tensors, BatchedLayout]:
        """Run the user's vmap rule."""
        rule, signature = self.rule, self.signature
        assert rule.vmap_rule is not None
        function = functools.partial(
            rule.vmap_rule, self.info, tuple(signature.entries(self.in_dims))
        )
        watch: Any = contextlib.nullcontext()
        if "fwd" not in self.state.watched:
            watch = captures.Watch(rule, "vmap_rule", leaves)
        with watch:
            returned = signature.parameters.call(function, signature.entries(leaves))
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise ForwardContractError(
                f"{rule.name}: a vmap rule must return a pair (output, out_dims)",
                rule=rule.where,
                function=rule.which("vmap_rule"),
                violations=[Violation("return", "a tuple of 2", describe(returned))],
                fix="Return (output, out_dims), with an int or None per output tensor.",
            )
        outs, outputs = trees.Structure.split(returned[0])
        dims = [
            self.in_range(out, dim)
            for out, dim in zip(outs, self.spread(*returned), strict=True)
        ]
        residuals = trees.Structure.split(())[1]
        inner = Layout(outputs, residuals, (), None, None)
        return outs, (), BatchedLayout(inner, self.in_dims, dims)

    def spread(self, out: Any, dims: Any) -> list[int | None]:
        """Return one dim per output tensor; one dim may stand for a whole subtree."""
        if isinstance(dims, int) or dims is None:
            return [
                dims for leaf in trees.flatten(out)[0] if isinstance(leaf, torch.Tensor)
            ]
        below, given = trees.children(out), dict(trees.children(dims) or ())
        if below is None or given.keys() != {key for key, _ in below}:
            raise self.unfit(describe(out), describe(dims))
        return [dim for key, o in below for dim in self.spread(o, given[key])]

    def in_range(self, out: torch.Tensor, dim: int | None) -> int | None:
        """Return a dim counted from the front; raise where the batch is not there."""
        if dim is None:
            return None
        if not -out.dim() <= dim < out.dim() or out.shape[dim] != self.size:
            expected = f"a dimension of size {self.size} (the batch) at {dim}"
            raise self.unfit(expected, describe(out))
        return dim % out.dim()

    def unfit(self, expected: str, got: str) -> ForwardContractError:
        return ForwardContractError(
            f"{self.rule.name}: out_dims of the vmap rule do not fit its output",
            rule=self.rule.where,
            function=self.rule.which("vmap_rule"),
            violations=[Violation("return", expected, got)],
            fix="Return out_dims with the structure of the output, or a prefix of it.",
        )


_MODES: dict[str, type[Batched]] = {
    "auto": Vectorized,
    "sequential": Looped,
    "expand_dims": Expanded,
    "broadcast_all": Expanded,
}


def _element(values: Sequence[Any], dims: Dims, index: int) -> list[Any]:
    return [
        value.select(dim, index)
        if isinstance(value, torch.Tensor) and dim is not None
        else value
        for value, dim in zip(values, dims, strict=True)
    ]


def _where(values: Sequence[Any], dims: Dims) -> list[int | None]:
    return [None if v is None else dim for v, dim in zip(values, dims, strict=True)]


def _share(value: torch.Tensor | None, size: int, place: int) -> torch.Tensor | None:
    """Divide a cotangent that belongs to a whole batch among its elements."""
    if value is None:
        return None
    sizes = [-1] * (value.dim() + 1)
    sizes[place] = size
    return (value / size).unsqueeze(place).expand(sizes)


def _stacked(column: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    like = next((value for value in column if value is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if v is None else v for v in column])


def _placed(
    value: torch.Tensor | None,
    dim: int | None,
    wanted: int | None,
    size: int,
    place: int,
    *,
    reduce: bool,
) -> torch.Tensor | None:
    """Move the batch dimension of a result to where it is wanted."""
    if value is None or (dim is None and wanted is None):
        return value
    if wanted is None:
        assert dim is not None
        assert reduce
        return value.sum(dim + place)
    if dim is None:
        value = value.unsqueeze(wanted + place)
        return value.expand(
            [size if i == wanted + place else -1 for i in range(value.dim())]
        )
    return value.movedim(dim + place, wanted + place)


def _same(first: dict[int, Any], second: dict[int, Any]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(_equal(first[key], second[key]) for key in first)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    return first is second or bool(first == second)

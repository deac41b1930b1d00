"""Curvature at one point as a linear operator, for many products."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch

from gradtools import trees
from gradtools.errors import DefinitionError, TransformError
from gradtools.lowering.boundary import is_tracing
from gradtools.second_order.extras import extra
from gradtools.second_order.primals import Primals, Tensors
from gradtools.second_order.reverse import Products
from gradtools.spelling import spelled
from gradtools.tables import as_html

__all__ = ["CurvatureOperator"]

MEMORY = 2**30
"""Bytes that a block of vectors may take, unless the caller says otherwise."""


class CurvatureOperator:
    """A symmetric matrix at one point, known by its products.

    It keeps the graph of the gradient, so that a product is one backward pass; call
    :meth:`close`, or use it in a ``with``, to let go of that memory.

    Attributes:
        value: The value of the function, a scalar.
        grad: Its gradient, in the structure of the primals.
        aux: What else the function returned, with ``has_aux=True``.
        shape: ``(n, n)`` for n numbers in the primals.
    """

    def __init__(
        self,
        name: str,
        primals: Primals,
        products: Products,
        aux: Any = None,
        agree: Callable[[float], float] = float,
    ) -> None:
        self._name = name
        self._primals = primals
        self._products: Products | None = products
        self._agree = agree  # with other ranks, which must take the same blocks
        self._is_bare = primals.argnums is None and len(primals.args) == 1
        self._paces: dict[_Way, list[float]] = {}  # seconds for each vector
        self._unable: set[_Way] = set()
        self.value = products.value
        self.grad = self._tree(products.grads)
        self.aux = aux
        count = sum(leaf.numel() for leaf in primals.leaves)
        self.shape = (count, count)

    def __repr__(self) -> str:
        state = "" if self._products else ", closed"
        return f"<{self._name} of {self.shape[0]} numbers{state}>"

    def _repr_html_(self) -> str:
        leaves = self._primals.leaves
        norms = [float(g.detach().norm()) for g in trees.flatten(self.grad)[0]]
        rows = [
            ("value", f"{float(self.value):.6g}"),
            ("norm of the gradient", f"{math.hypot(*norms):.6g}"),
            ("tensors", ", ".join(str(tuple(leaf.shape)) for leaf in leaves)),
            ("dtype", ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))),
            ("device", ", ".join(sorted({str(leaf.device) for leaf in leaves}))),
        ]
        return as_html(repr(self), rows)

    def __enter__(self) -> CurvatureOperator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph; a product asked for later is an error."""
        self._products = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all primals share."""
        return self._shared("dtype")

    @property
    def device(self) -> torch.device:
        """The device that all primals share."""
        return self._shared("device")

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The same, where the operator is a matrix: not of complex numbers.

        In them the product with 1j is another than 1j times the product.
        """
        if self.dtype.is_complex:
            raise DefinitionError(
                f"{self._name}: in complex numbers it is linear over the real ones "
                "alone, and has no matrix, no diagonal and no eigenvalues",
                fix="Differentiate in real numbers: take x = torch.view_as_real(z), "
                "and z = torch.view_as_complex(x) inside of the function.",
            )
        return self.dtype

    def __call__(self, *tangents: Any) -> Any:
        """Multiply with one vector.

        Args:
            *tangents: One tree per primal, with the shapes of its tensors.

        Returns:
            The product, in the structure of the primals; bare for one primal.
        """
        given = self._primals.tangents(self._given(tangents))
        return self._tree(self._open().product(given))

    @spelled
    def block(
        self, *vectors: Any, chunk: int | None = None, memory: int = MEMORY
    ) -> Any:
        """Multiply with several vectors.

        Args:
            *vectors: As for a call, with one leading dimension, the same for all.
            chunk: How many to take at a time, in one vectorized backward pass; 1 goes
                through them one by one. None finds out, within the memory: the first
                blocks are timed in each way, and the fastest is kept. One of them, for
                a Hessian, runs the function again: forward over reverse. It is left out
                where the function captures a tensor that requires a gradient, draws
                random numbers, or is not the same when it is run again.
            memory: Bytes that the vectors under way may take, by an upper estimate.

        Returns:
            The products, with the same leading dimension.
        """
        given, count = self._primals.block(self._given(vectors))
        if count == 0:
            self._open()
            return self._tree([torch.empty_like(vector) for vector in given])
        if is_tracing():  # nothing can be timed, and loops are unrolled
            chunk = chunk or count
        if chunk is None:
            parts = list(self._at_the_best_pace(given, count, memory))
        else:
            sizes = itertools.repeat(self._positive(chunk))
            parts = [self._several(part) for part in _chunks(given, count, sizes)]
        if len(parts) == 1:
            return self._tree(parts[0])
        return self._tree([torch.cat(column) for column in zip(*parts, strict=True)])

    def __matmul__(self, other: Any) -> Any:
        """Multiply with a vector, or with the columns of a matrix of n rows.

        Args:
            other: A tensor ``(n,)`` or ``(n, k)``, laid flat as by :meth:`flatten`; or
                what a call takes, for one primal.
        """
        count = self.shape[0]
        if isinstance(other, torch.Tensor) and not self._is_like_the_primal(other):
            if other.dim() == 1 and len(other) == count:
                return self.flatten(self(*self.apart(self.unflatten(other))))
            if other.dim() == 2 and len(other) == count:
                found = self.block(*self.apart(self.unflatten(other.mT)))
                return self.flatten(found, is_block=True).mT
            raise DefinitionError(
                f"{self._name} @ tensor: it has {count} columns, and the tensor has "
                f"shape {tuple(other.shape)}",
                fix=f"Give shape ({count},) or ({count}, k).",
            )
        return self(*self.apart(other))

    @spelled
    def flatten(self, tree: Any, *, is_block: bool = False) -> torch.Tensor:
        """Lay a tree like the primals flat: ``(n,)``, or ``(k, n)`` for a block."""
        given = self._given(self.apart(tree))
        if is_block:
            values, count = self._primals.block(given)
            leaves = self._primals.leaves
            return torch.cat(
                [
                    value.reshape(count, leaf.numel())
                    for value, leaf in zip(values, leaves, strict=True)
                ],
                1,
            )
        return torch.cat([value.reshape(-1) for value in self._primals.tangents(given)])

    @spelled
    def unflatten(self, vector: torch.Tensor) -> Any:
        """Undo :meth:`flatten`: for ``(n,)``, or ``(k, n)`` for a block."""
        leaves = self._primals.leaves
        parts = vector.split([leaf.numel() for leaf in leaves], -1)
        return self._tree(
            [
                part.reshape((*vector.shape[:-1], *leaf.shape))
                for part, leaf in zip(parts, leaves, strict=True)
            ]
        )

    def to_scipy(self) -> Any:
        """Return it as a ``scipy.sparse.linalg.LinearOperator`` on numpy arrays."""
        linalg = extra("scipy.sparse.linalg", "scipy")
        dtype, device = self.matrix_dtype, self.device

        def multiply(array: Any) -> Any:
            if np.iscomplexobj(array):
                return multiply(array.real) + 1j * multiply(array.imag)
            given = torch.as_tensor(array, dtype=dtype, device=device)
            flat = given.reshape(-1) if given.shape[-1:] == (1,) else given
            return (self @ flat).detach().cpu().numpy().reshape(array.shape)

        return linalg.LinearOperator(
            self.shape,
            dtype=torch.empty((), dtype=dtype, device="cpu").numpy().dtype,
            matvec=multiply,
            rmatvec=multiply,
            matmat=multiply,
            rmatmat=multiply,
        )

    # What a call is given and returns: bare for one primal.

    def _given(self, trees_: Sequence[Any]) -> Any:
        argnums = self._primals.argnums
        wanted = 1 if isinstance(argnums, int) else len(argnums or self._primals.args)
        if len(trees_) != wanted:
            raise DefinitionError(
                f"{self._name}: it is of {wanted} primals, and {len(trees_)} vectors "
                "came",
                fix="Give one tree for each primal.",
            )
        return trees_[0] if isinstance(argnums, int) else tuple(trees_)

    def _tree(self, values: Sequence[Any]) -> Any:
        tree = self._primals.tree(values)
        return tree[0] if self._is_bare else tree

    def apart(self, tree: Any) -> tuple[Any, ...]:
        """Return the arguments of a call from a vector as it comes back from one."""
        is_one = self._is_bare or isinstance(self._primals.argnums, int)
        return (tree,) if is_one else tuple(tree)

    def _is_like_the_primal(self, tensor: torch.Tensor) -> bool:
        primals = self._primals
        is_bare = trees.is_leaf(primals.args[0]) and self._is_bare
        return is_bare and tensor.shape == primals.leaves[0].shape

    def _shared(self, what: str) -> Any:
        found = {getattr(leaf, what) for leaf in self._primals.leaves}
        if len(found) == 1:
            return found.pop()
        raise DefinitionError(
            f"{self._name}: its primals have no {what} in common: "
            + ", ".join(sorted(map(str, found))),
            fix="Multiply with trees instead of flat vectors.",
        )

    def _open(self) -> Products:
        if self._products is None:
            raise TransformError(
                f"{self._name}: it has been closed, and its graph is gone",
                fix="Ask for the product before close(), or inside the with.",
            )
        return self._products

    # Blocks.

    def _positive(self, chunk: int) -> int:
        if isinstance(chunk, int) and chunk > 0:
            return chunk
        raise DefinitionError(
            f"{self._name}: chunk must be a positive number, not {chunk!r}",
            fix="Leave it out to have it chosen.",
        )

    def _several(self, vectors: Tensors) -> Tensors:
        products = self._open()
        if len(vectors[0]) == 1:
            (*single,) = (vector[0] for vector in vectors)
            return [found[None] for found in products.product(single)]
        try:
            return products.product(vectors, is_block=True)
        except RuntimeError:  # an operator, or a Function, that vmap cannot serve
            singles = (
                products.product([vector[place] for vector in vectors])
                for place in range(len(vectors[0]))
            )
            return [torch.stack(column) for column in zip(*singles, strict=True)]

    def _at_the_best_pace(
        self, vectors: Tensors, count: int, memory: int
    ) -> Iterator[Tensors]:
        """Yield products by parts; each way has its turns until one is the fastest."""
        most = max(1, min(count, memory // max(1, self._bytes_of_a_product)))
        ways = [_Way(size) for size in sorted({1, min(most, 4), most})]
        if most > 1:
            ways.append(_Way(most, is_forward=True))
        able = [way for way in ways if way not in self._unable]
        done = 0
        while done < count:
            way = min(able, key=self._rank)
            size = way.size
            part = vectors
            if done or size < count:
                part = [vector[done : done + size] for vector in vectors]
            is_trial = len(self._paces.get(way, ())) < _TRIALS
            begin = self._clock() if is_trial else 0.0
            found = (self._open().pushed if way.is_forward else self._several)(part)
            seconds = self._agree(self._clock() - begin) if is_trial else 0.0
            if found is None or (
                way.is_forward and is_trial and not self._agrees(part, found)
            ):
                self._unable.add(way)
                able.remove(way)
                continue
            if is_trial:
                self._paces.setdefault(way, []).append(seconds / len(part[0]))
            yield found
            done += size

    def _rank(self, way: _Way) -> tuple[int, float]:
        """Put those with fewer trials first, then those that took less time."""
        paces = self._paces.get(way, ())
        return len(paces), min(paces, default=float(way.is_forward))

    def _clock(self) -> float:
        """Return seconds: of this thread where it does all the work, whoever waits."""
        if not self._primals.leaves[0].is_cpu:
            torch.accelerator.synchronize()
        elif torch.get_num_threads() == 1:
            return time.thread_time()
        return time.perf_counter()

    @functools.cached_property
    def _bytes_of_a_product(self) -> int:
        return int(self._agree(self._open().bytes_of_a_product()))

    def _agrees(self, vectors: Tensors, found: Tensors) -> bool:
        """Whether the first of the products is what the graph gives."""
        wanted = self._open().product([vector[0] for vector in vectors])
        pairs = list(zip(found, wanted, strict=True))
        off = sum(float((a[0] - b).abs().square().sum()) for a, b in pairs)
        size = sum(float(b.abs().square().sum()) for _, b in pairs)
        return off <= max(torch.finfo(b.dtype).eps for _, b in pairs) * size


class _Way(NamedTuple):
    """How many vectors are taken at a time: in forward mode, or through the graph."""

    size: int
    is_forward: bool = False


_TRIALS = 3


def _chunks(
    vectors: Tensors, count: int, sizes: Iterable[int]
) -> Iterable[list[torch.Tensor]]:
    done = 0
    for size in sizes:
        if done >= count:
            return
        yield [vector[done : done + size] for vector in vectors]
        done += size

"""Curvature of a function that is summed over batches and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed

from gradtools.errors import DefinitionError
from gradtools.second_order.extras import extra
from gradtools.second_order.primals import Tensors
from gradtools.second_order.reverse import Products

__all__ = ["OverBatches", "OverRanks"]


class OverBatches:
    """The sum of what the batches give, one after the other: no graph is kept."""

    def __init__(
        self,
        at: Callable[[Any], Products],
        batches: Iterable[Any],
        who: str,
        progress: bool,
    ) -> None:
        if isinstance(batches, Iterator):
            raise DefinitionError(
                f"{who}: the batches are an iterator, which can be gone through once "
                "only, and each product goes through them",
                fix="Give a list, or the loader itself: batches=loader.",
            )
        self._at, self._batches, self._who = at, batches, who
        self._progress = progress
        self._largest = 0
        first, *grads = self._summed(self._value_and_grads, "gradient")
        self.value, self.grads = first, grads
        self.aux: Tensors = ()

    def product(
        self, tangents: Tensors, *, is_last: bool = False, is_block: bool = False
    ) -> Tensors:
        """Multiply, batch by batch."""
        return self._summed(
            lambda at: at.product(tangents, is_last=True, is_block=is_block), "product"
        )

    def pushed(self, tangents: Tensors) -> Tensors | None:
        """Return None: there is no other way."""
        return None

    def bytes_of_a_product(self) -> int:
        """Return what the largest batch needs."""
        return self._largest

    def _value_and_grads(self, at: Products) -> Tensors:
        self._largest = max(self._largest, at.bytes_of_a_product())
        return [at.value, *at.grads]

    def _summed(self, of: Callable[[Products], Tensors], what: str) -> Tensors:
        batches = self._batches
        if self._progress:
            track = extra("rich.progress", "report").track
            batches = track(batches, description=f"{self._who}: {what}")
        total: Tensors | None = None
        for batch in batches:
            found = of(self._at(batch))
            total = (
                found
                if total is None
                else [a + b for a, b in zip(total, found, strict=True)]
            )
        if total is None:
            raise DefinitionError(
                f"{self._who}: there are no batches to sum over",
                fix="Give at least one; an iterator that has been read has none left.",
            )
        return total


class OverRanks:
    """The sum of what the ranks of a process group give, by one all-reduce each."""

    def __init__(self, products: Products, group: Any, who: str) -> None:
        if torch.distributed.get_rank(group) < 0:  # its all-reduce would do nothing
            raise DefinitionError(
                f"{who}: rank {torch.distributed.get_rank()} is not in the group",
                fix="Ask for the operator on the ranks of the group alone.",
            )
        self._products, self._group = products, group
        self.value, *self.grads = self._summed([products.value, *products.grads])
        self.aux = products.aux

    def product(
        self, tangents: Tensors, *, is_last: bool = False, is_block: bool = False
    ) -> Tensors:
        """Multiply, and add up."""
        return self._summed(
            self._products.product(tangents, is_last=is_last, is_block=is_block)
        )

    def pushed(self, tangents: Tensors) -> Tensors | None:
        """Return None: there is no other way."""
        return None

    def bytes_of_a_product(self) -> int:
        """Return what this rank needs."""
        return self._products.bytes_of_a_product()

    def largest(self, number: float) -> float:
        """Return the largest of the ranks' numbers, for what all must do the same."""
        device = self.value.device
        found = torch.tensor(number, dtype=torch.float64, device=device)
        largest = torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(found, largest, group=self._group)
        return float(found)

    def _summed(self, tensors: Tensors) -> list[torch.Tensor]:
        """Add up over the ranks; one all-reduce for each dtype and device."""
        kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
        found = list(tensors)
        for kind in dict.fromkeys(kinds):
            places = [i for i, other in enumerate(kinds) if other == kind]
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
            torch.distributed.all_reduce(flat, group=self._group)
            parts = flat.split([tensors[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                found[i] = part.view(tensors[i].shape)
        return found

"""What a check finds around a rule and leaves as it was: random state and buffers."""

from __future__ import annotations

import contextlib
import contextvars
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradtools import torch_compat
from gradtools.lowering.boundary import without_compiling
from gradtools.lowering.contents import modules_within
from gradtools.lowering.replay import random_state, replayed, same

__all__ = [
    "Randomness",
    "Unreachable",
    "buffers_kept",
    "in_fresh_thread",
    "without_ranks",
]

T = TypeVar("T")


class Unreachable(Exception):  # noqa: N818 (it stops a check and nothing else)
    """What stands in the way of a check, found while it runs."""


class _Alone(TorchDispatchMode):
    """Stop before a collective: the other ranks would have to take part."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in _COLLECTIVE:
            raise Unreachable(
                f"the rule calls {func.name()}, for which the other ranks would have "
                "to run the check at the same time"
            )
        return func(*args, **(kwargs or {}))


_COLLECTIVE = ("c10d", "_c10d_functional", "c10d_functional")


def without_ranks() -> contextlib.AbstractContextManager[Any]:
    """Raise :class:`Unreachable` where code communicates with other ranks."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return _Alone()
    return contextlib.nullcontext()


class Randomness:
    """The random generators that code may draw from, and their state at the start.

    torch's (also on the devices of the arguments), numpy's and Python's global ones.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.leaves = leaves
        self.torch = random_state(leaves)
        self.numpy = np.random.get_state()
        self.python = random.getstate()

    def is_untouched(self) -> bool:
        """Whether nothing has been drawn since the start."""
        return (
            same(self.torch, random_state(self.leaves))
            and self.python == random.getstate()
            and _same_numpy(self.numpy, np.random.get_state())
        )

    def advance(self) -> None:
        """Draw a number from every generator."""
        for device in self.torch:
            torch.rand(1, device=device)
        np.random.random()
        random.random()

    @contextlib.contextmanager
    def rewound(self) -> Generator[None]:
        """Draw what was drawn from the start on; then go on as if nothing had been."""
        with replayed(self.torch):
            numpy, python = np.random.get_state(), random.getstate()
            np.random.set_state(self.numpy)
            random.setstate(self.python)
            try:
                yield
            finally:
                np.random.set_state(numpy)
                random.setstate(python)


def _same_numpy(first: Any, second: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@contextlib.contextmanager
def buffers_kept(values: Iterable[Any]) -> Generator[None]:
    """Put the buffers of all modules within reach of the values back in the end."""
    modules = [module for value in values for module in modules_within(value)]
    before = [
        (buffers, name, buffer, None if buffer is None else _kept(buffer))
        for module in modules
        for buffers in [module._buffers]  # pyright: ignore[reportPrivateUsage]
        for name, buffer in buffers.items()
    ]
    try:
        yield
    finally:
        for holder, name, buffer, value in before:
            if holder.get(name) is not buffer:
                holder[name] = buffer
            if buffer is not None and value is not None:
                torch_compat.put_back(buffer, *value)


def _kept(buffer: torch.Tensor) -> tuple[torch.Tensor, int]:
    return buffer.detach().clone(), buffer._version


def in_fresh_thread(function: Callable[[], T]) -> T:
    """Run a function where no transform, no fake mode and no trace is under way."""
    here = _device_contexts()
    context = contextvars.copy_context()

    def run() -> T:
        with contextlib.ExitStack() as stack:
            for entered in here:
                stack.enter_context(entered)
            stack.enter_context(without_compiling())
            return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(context.run, run).result()


def _device_contexts() -> list[contextlib.AbstractContextManager[Any]]:
    """Return what makes another thread compute where this one does."""
    found: list[Any] = []
    if torch.get_default_device().type != "cpu":
        found.append(torch.get_default_device())
    if torch.cuda.is_initialized():
        found.append(torch.cuda.device(torch.cuda.current_device()))
        found.append(torch.cuda.stream(torch.cuda.current_stream()))
    return found

"""Running fwd a second time so that it draws the same random numbers.

Second derivatives differentiate the residuals through fwd, which runs again for it; a
dropout mask must then be the mask of the first time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.lowering.residuals import Layout

__all__ = ["is_traced", "random_state", "recorded", "replayed", "same"]

State = dict[torch.device, torch.Tensor]


def random_state(leaves: Iterable[Any]) -> State:
    """Return the state of the generators that code on these tensors draws from."""
    cpu = torch.device("cpu")
    state = {cpu: _get(cpu)}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda and leaf.device not in state:
            state[leaf.device] = _get(leaf.device)
    return state


def same(first: State, second: State) -> bool:
    """Whether nothing was drawn between two states."""
    return first.keys() == second.keys() and all(
        torch.equal(state, second[device]) for device, state in first.items()
    )


def is_traced(leaves: Iterable[Any]) -> bool:
    """Whether some of the tensors are fake: nothing is really drawn then."""
    return any(isinstance(x, torch.Tensor) and torch_compat.is_fake(x) for x in leaves)


def recorded(
    forward: Callable[[Sequence[Any]], tuple[Any, Any, Layout]], leaves: Sequence[Any]
) -> tuple[Any, Any, Layout]:
    """Run a forward, and note on its layout the random state that it drew from."""
    if is_traced(leaves):
        return forward(leaves)
    before = random_state(leaves)
    outs, new, layout = forward(leaves)
    layout.rng = None if same(before, random_state(leaves)) else before
    return outs, new, layout


@contextlib.contextmanager
def replayed(state: State | None) -> Generator[None]:
    """Draw from ``state`` on, and leave the generators as they were."""
    if state is None:
        yield
        return
    before = {device: _get(device) for device in state}
    try:
        for device, value in state.items():
            _set(device, value)
        yield
    finally:
        for device, value in before.items():
            _set(device, value)


# torch holds the generator's mutex while it makes the Python object of a state; if the
# garbage collector then lets another thread run, which waits for the mutex with the GIL
# in hand, both wait for ever. So one thread at a time.
_one_at_a_time = threading.RLock()


def _get(device: torch.device) -> torch.Tensor:
    with _one_at_a_time:
        if device.type == "cpu":
            return torch.get_rng_state()
        return torch.cuda.get_rng_state(device)


def _set(device: torch.device, state: torch.Tensor) -> None:
    with _one_at_a_time:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)

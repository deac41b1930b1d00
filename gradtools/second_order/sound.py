"""The surroundings in which a function is differentiated, for a right result."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from gradtools import torch_compat
from gradtools.lowering.boundary import is_tracing
from gradtools.second_order.dual_numbers import OneJacobian
from gradtools.second_order.stand_ins import StandIns, StandInsOfForwardMode

__all__ = [
    "has_no_forward_mode",
    "in_both_modes",
    "in_forward_mode",
    "is_under_way",
    "is_within_transforms",
    "plainly",
    "usable",
    "within_transforms",
]


def is_within_transforms() -> bool:
    """Whether derivatives have to be taken by torch.func.

    Under forward mode too: plain autograd would take some residuals for constants.
    """
    return (
        is_tracing()
        or torch_compat.transforms_active()
        or torch_compat.forward_ad_active()
    )


def is_under_way(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a derivative is taken around here, of what is computed from tensors."""
    return (
        is_tracing()
        or torch_compat.is_being_differentiated()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def plainly(order: int) -> AbstractContextManager[Any]:
    """Return the context for plain autograd, also in inference mode.

    What else torch does wrongly shows in the graph, see :class:`.Pullback`: a context
    that watches every function would cost some percent.

    Args:
        order: How many derivatives are taken, one upon the other. At 1 a fused
            attention stays, for a second derivative of it would be an error by name.
    """
    if torch.is_inference_mode_enabled():
        return _out_of_inference_mode(order)
    return _math_attention if order > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def _out_of_inference_mode(order: int) -> Generator[None]:
    with torch.inference_mode(False), plainly(order):
        yield


@contextlib.contextmanager
def within_transforms() -> Generator[None]:
    """Run functions under torch.func, or under the eyes of torch.compile."""
    with _with_stand_ins(StandIns()):
        yield


@contextlib.contextmanager
def in_forward_mode() -> Generator[None]:
    """Run functions in forward mode, in one thread at a time.

    torch has one level of it for all threads of a process.
    """
    is_on = torch.is_grad_enabled()  # leaving inference mode would switch it on
    with (
        contextlib.nullcontext() if is_tracing() else _one_at_a_time,
        _with_stand_ins(StandInsOfForwardMode()),
        torch.set_grad_enabled(is_on),
    ):
        yield


@contextlib.contextmanager
def in_both_modes() -> Generator[Callable[[], AbstractContextManager[None]]]:
    """Take a derivative in forward mode and one in reverse mode, of one run.

    Yields:
        The context for the run itself.
    """
    with (
        _one_at_a_time,
        torch.inference_mode(False),
        torch.enable_grad(),
        forward_ad.dual_level(),
    ):
        yield partial(_with_stand_ins, OneJacobian())


def usable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor to differentiate in: a copy of one of inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def has_no_forward_mode(error: RuntimeError) -> bool:
    """Whether an error says that forward mode is missing, or fails by itself."""
    return any(words in str(error) for words in _WITHOUT_FORWARD_MODE)


_WITHOUT_FORWARD_MODE = (
    "forward AD",  # of an operator that has none
    "forward mode AD",  # or of a Function
    "ZeroTensors are immutable",  # dual numbers in the backward of mse_loss
    "autograd.Function with functorch",  # a gradient inside, of an old Function
    "saved tensor hooks",  # or of a checkpoint
)


@contextlib.contextmanager
def _with_stand_ins(stand_ins: TorchFunctionMode) -> Generator[None]:
    if is_tracing():  # the graph of a trace must not throw switches
        with stand_ins:
            yield
    else:
        with torch.inference_mode(False), stand_ins, _math_attention:
            yield


class _MathAttention:
    """A context in which scaled_dot_product_attention is made of plain operators.

    The switch is one of the process, so that whoever needs it counts itself in and out,
    and the last one puts back what the first one found. Two threads that each saved and
    restored it would leave it off for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found: list[bool] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._found = [is_on() for is_on, _ in _BACKENDS]
                for _, switch in _BACKENDS[:-1]:
                    switch(False)
                _BACKENDS[-1][1](True)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for (_, switch), was_on in zip(_BACKENDS, self._found, strict=True):
                    switch(was_on)


_cuda = torch.backends.cuda  # where the switches are, of the CPU's kernels too
_BACKENDS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
)
_math_attention = _MathAttention()
_one_at_a_time = threading.RLock()

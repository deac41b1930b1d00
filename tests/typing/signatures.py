"""A rule keeps the signature of its function: for type checkers, not to be run."""

from typing import Any, assert_type

import torch

import gradtools as gt
from gradtools.testing import check_grads


@gt.custom_vjp
def bare(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    """A rule by the bare decorator."""
    return factor * x


@gt.custom_vjp(vmap="sequential", contract=gt.Surrogate())
def called(x: torch.Tensor, *, name: str) -> tuple[torch.Tensor, int]:
    """A rule by the decorator with options."""
    return x, len(name)


@gt.custom_jvp
def forward(x: torch.Tensor) -> torch.Tensor:
    """A rule of forward mode."""
    return x


@gt.custom_root(lambda x, a: x**2 - a, solve="cg")
def square_root(init: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A solver with a derivative."""
    return a.sqrt()


@gt.gradcheck_policy("off")
def unchecked(x: torch.Tensor, times: int) -> torch.Tensor:
    """A function under a policy."""
    return times * x


class Layer:
    """A class with a rule for a method."""

    @gt.custom_vjp
    def scaled(self, x: torch.Tensor, factor: int) -> torch.Tensor:
        """A method."""
        return factor * x


@bare.def_bwd
def bwd(residuals: object, g: torch.Tensor) -> torch.Tensor:
    """A backward, which stays what it is."""
    return g


def check(x: torch.Tensor, layer: Layer) -> None:
    """Say what each call returns, and what no call may say."""
    assert_type(bare(x), torch.Tensor)
    assert_type(bare(x, factor=1.0), torch.Tensor)
    assert_type(called(x, name="a"), tuple[torch.Tensor, int])
    assert_type(forward(x), torch.Tensor)
    assert_type(layer.scaled(x, 3), torch.Tensor)
    assert_type(bwd((), x), torch.Tensor)
    assert_type(gt.clip_grad(x, -1.0, 1.0), torch.Tensor)
    assert_type(square_root(x, a=x), torch.Tensor)
    assert_type(unchecked(x, 2), torch.Tensor)
    assert_type(gt.straight_through(torch.sign)(x), torch.Tensor)
    assert_type(bare.gradcheck(x, factor=3.0).outcome == "passed", bool)
    assert_type(check_grads(bare, (x,)).seconds, float)
    assert_type(gt.value_and_grad(bare)(x, factor=2.0), tuple[Any, Any])
    assert_type(gt.hvp_fn(bare, x).value, torch.Tensor)
    assert_type(gt.hessian_trace(bare, x).stderr, Any)
    gt.grad(bare)(x, 3.0)


def refused(x: torch.Tensor, layer: Layer) -> None:
    """What no call may say: each line is an error, and of which kind."""
    bare(x, "a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bare(x, other=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    called(x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    layer.scaled(x, "a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bare.gradcheck(x, "a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    square_root(x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    unchecked(x, "a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    gt.grad(bare)(x, other=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    gt.hvp(bare, (x,), (x,), mdoe="auto")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    gt.custom_vjp(vmap="serial")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]

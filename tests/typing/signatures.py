"""A rule keeps the signature of its function: for a type checker, not to be run."""

from typing import assert_type

import torch

import gradtools as gt


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
    bare(x, "a")  # pyright: ignore[reportArgumentType]
    bare(x, other=1)  # pyright: ignore[reportCallIssue]
    called(x)  # pyright: ignore[reportCallIssue]
    layer.scaled(x, "a")  # pyright: ignore[reportArgumentType]
    gt.custom_vjp(vmap="serial")  # pyright: ignore[reportArgumentType, reportCallIssue]

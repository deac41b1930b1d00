"""A contest: one rule, its spellings, and what is done with them."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

TINY = 4  # numbers in the first argument where the layer is all that counts

GRADTOOLS = "gradtools"
COMBINED = "forward(ctx, ...)"
COMPOSABLE = "setup_context"
GENERATED = "generate_vmap_rule"
OWN_VMAP = "own vmap"
CUSTOM_OP = "custom_op"
COMPOSITE = "plain autograd"

# torch.func refuses the combined form, and custom_op under its reverse mode.
UNDER_VMAP = (GRADTOOLS, GENERATED, OWN_VMAP, CUSTOM_OP, COMPOSITE)
UNDER_FUNC = (GRADTOOLS, GENERATED, OWN_VMAP, COMPOSITE)

Run = Callable[[], Any]


class Numbers:
    """Draws the tensors of a contest, always the same ones."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.options = {"dtype": dtype, "device": device}

    def normal(self, *shape: int) -> torch.Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator).to(**self.options)

    def positive(self, *shape: int) -> torch.Tensor:
        """Return numbers from one half to one and a half."""
        return torch.rand(shape, generator=self.generator).to(**self.options) + 0.5


class Contest(NamedTuple):
    """One rule.

    Attributes:
        name: What the rule computes.
        fun: The function; under plain autograd it is a spelling as well.
        draw: From a size and a source of numbers to the arguments.
        argnums: The arguments in which it is derived.
        spellings: By their names, functions of the same arguments.
    """

    name: str
    fun: Callable[..., Any]
    draw: Callable[[int, Numbers], tuple[Any, ...]]
    argnums: tuple[int, ...]
    spellings: Mapping[str, Callable[..., Any]]

    def arguments(
        self,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        batch: int | None = None,
    ) -> tuple[Any, ...]:
        """Return arguments that require no gradient.

        Args:
            size: How many numbers the first argument has.
            dtype: Of all tensors.
            device: Of all tensors.
            batch: A batch of first arguments, for a vmap that shares the others.
        """
        numbers = Numbers(dtype, device)
        first, *others = self.draw(size, numbers)
        if batch is not None:
            first = numbers.normal(batch, *first.shape)
        return first, *others

    def active(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments of which the differentiable ones require a gradient."""
        return tuple(
            pytree.tree_map(lambda x: x.detach().requires_grad_(), arg)
            if position in self.argnums
            else arg
            for position, arg in enumerate(args)
        )

    def step(self, spelling: Callable[..., Any], args: tuple[Any, ...]) -> Run:
        """Return forward and backward on arguments that are there already."""
        args = self.active(args)
        wanted = [x for x in pytree.tree_leaves(args) if x.requires_grad]
        like = self.fun(*args)
        if isinstance(like, torch.Tensor):
            g = torch.ones_like(like)
            if len(args) == 1:
                (x,) = args
                return lambda: torch.autograd.grad(spelling(x), wanted, g)
            return lambda: torch.autograd.grad(spelling(*args), wanted, g)
        gs = [torch.ones_like(out) for out in like]
        return lambda: torch.autograd.grad(spelling(*args), wanted, gs)

    def total(self, spelling: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        """Return a function with one number for a result, as torch.func.grad wants."""

        def total(*args: Any) -> torch.Tensor:
            outs = spelling(*args)
            if isinstance(outs, torch.Tensor):
                return outs.sum()
            return sum(out.sum() for out in outs)

        return total

    def transformed(
        self, work: str, spelling: Callable[..., Any], args: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """Return a spelling under transforms, over a batch of first arguments."""
        in_dims = (0, *itertools.repeat(None, len(args) - 1))
        match work:
            case "vmap":
                return torch.func.vmap(spelling, in_dims)
            case "vmap(grad)":
                gradient = torch.func.grad(self.total(spelling), self.argnums)
                return torch.func.vmap(gradient, in_dims)
            case "grad(vmap)":
                mapped = torch.func.vmap(spelling, in_dims)
                return torch.func.grad(self.total(mapped), self.argnums)
            case _:
                raise ValueError(work)


TRANSFORMS = ("vmap", "vmap(grad)", "grad(vmap)")

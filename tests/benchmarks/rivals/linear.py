"""A linear layer over data, which derives what is needed and no more."""

import math

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

import gradtools as gt
from tests.benchmarks.rivals import contest

WIDEST = 256


def composite(x, w, b):
    return functional.linear(x, w, b)


@gt.custom_vjp
def linear(x, w, b):
    return functional.linear(x, w, b)


@linear.def_fwd
def _(x, w, b):
    return functional.linear(x, w, b), (x, w)


@linear.def_bwd
def _(residuals, g, *, needs):
    x, w = residuals
    needs_x, needs_w, needs_b = needs
    return (
        g @ w if needs_x else None,
        g.mT @ x if needs_w else None,
        g.sum(0) if needs_b else None,
    )


class Combined(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return functional.linear(x, w, b)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad
        return (
            g @ w if needs_x else None,
            g.mT @ x if needs_w else None,
            g.sum(0) if needs_b else None,
        )


class Composable(Function):
    @staticmethod
    def forward(x, w, b):
        return functional.linear(x, w, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, _ = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad
        return (
            g @ w if needs_x else None,
            g.mT @ x if needs_w else None,
            g.sum(0) if needs_b else None,
        )


class Generated(Composable):
    generate_vmap_rule = True


class OwnVmap(Composable):
    """Takes more rows instead of a batch, where the parameters are shared."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad
        rows = g.flatten(0, -2)
        return (
            g @ w if needs_x else None,
            rows.mT @ x.flatten(0, -2) if needs_w else None,
            rows.sum(0) if needs_b else None,
        )

    @staticmethod
    def vmap(info, in_dims, x, w, b):
        if in_dims[1:] != (None, None):
            raise NotImplementedError("a batch of weights")
        return OwnVmap.apply(x.movedim(in_dims[0], 0), w, b), 0


@torch.library.custom_op("gradtools_rivals::linear", mutates_args=())
def operator(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.linear(x, w, b)


@operator.register_fake
def _(x, w, b):
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def setup_context(ctx, inputs, output):
    x, w, _ = inputs
    ctx.save_for_backward(x, w)


def backward(ctx, g):
    x, w = ctx.saved_tensors
    needs_x, needs_w, needs_b = ctx.needs_input_grad
    return (
        g @ w if needs_x else None,
        g.mT @ x if needs_w else None,
        g.sum(0) if needs_b else None,
    )


operator.register_autograd(backward, setup_context=setup_context)


@operator.register_vmap
def _(info, in_dims, x, w, b):
    if in_dims[1:] != (None, None):
        raise NotImplementedError("a batch of weights")
    return operator(x.movedim(in_dims[0], 0), w, b), 0


def draw(size, numbers):
    columns = min(WIDEST, math.isqrt(size))
    normal = numbers.normal
    return normal(size // columns, columns), normal(columns, columns), normal(columns)


LINEAR = contest.Contest(
    "linear",
    composite,
    draw,
    (1, 2),
    {
        contest.GRADTOOLS: linear,
        contest.COMBINED: Combined.apply,
        contest.COMPOSABLE: Composable.apply,
        contest.GENERATED: Generated.apply,
        contest.OWN_VMAP: OwnVmap.apply,
        contest.CUSTOM_OP: operator,
        contest.COMPOSITE: composite,
    },
)

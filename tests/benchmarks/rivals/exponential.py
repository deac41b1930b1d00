"""The exponential, whose output is its own residual."""

import torch
from torch import Tensor
from torch.autograd import Function

import gradtools as gt
from tests.benchmarks.rivals import contest


def composite(x):
    return torch.exp(x)


@gt.custom_vjp
def exponential(x):
    return torch.exp(x)


@exponential.def_fwd
def _(x):
    y = torch.exp(x)
    return y, y


@exponential.def_bwd
def _(y, g):
    return g * y


class Combined(Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.exp(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


class Composable(Function):
    @staticmethod
    def forward(x):
        return torch.exp(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


class Generated(Composable):
    generate_vmap_rule = True


class OwnVmap(Composable):
    @staticmethod
    def vmap(info, in_dims, x):
        return OwnVmap.apply(x), in_dims[0]


@torch.library.custom_op("gradtools_rivals::exponential", mutates_args=())
def operator(x: Tensor) -> Tensor:
    return torch.exp(x)


@operator.register_fake
def _(x):
    return torch.empty_like(x)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def backward(ctx, g):
    (y,) = ctx.saved_tensors
    return g * y


operator.register_autograd(backward, setup_context=setup_context)


@operator.register_vmap
def _(info, in_dims, x):
    return operator(x), in_dims[0]


EXPONENTIAL = contest.Contest(
    "exp",
    composite,
    lambda size, numbers: (numbers.normal(size),),
    (0,),
    {
        contest.GRADTOOLS: exponential,
        contest.COMBINED: Combined.apply,
        contest.COMPOSABLE: Composable.apply,
        contest.GENERATED: Generated.apply,
        contest.OWN_VMAP: OwnVmap.apply,
        contest.CUSTOM_OP: operator,
        contest.COMPOSITE: composite,
    },
)

"""The swish, with a residual that is computed: the sigmoid."""

import torch
from torch import Tensor
from torch.autograd import Function

import gradtools as gt
from tests.benchmarks.rivals import contest


def composite(x, beta):
    return x * torch.sigmoid(beta * x)


@gt.custom_vjp
def swish(x, beta):
    return x * torch.sigmoid(beta * x)


@swish.def_fwd
def _(x, beta):
    s = torch.sigmoid(beta * x)
    return x * s, (x, beta, s)


@swish.def_bwd
def _(residuals, g):
    x, beta, s = residuals
    ds = s * (1 - s)
    return g * (s + x * beta * ds), (g * x * x * ds).sum()


class Combined(Function):
    @staticmethod
    def forward(ctx, x, beta):
        s = torch.sigmoid(beta * x)
        ctx.save_for_backward(x, beta, s)
        return x * s

    @staticmethod
    def backward(ctx, g):
        x, beta, s = ctx.saved_tensors
        ds = s * (1 - s)
        return g * (s + x * beta * ds), (g * x * x * ds).sum()


class Composable(Function):
    @staticmethod
    def forward(x, beta):
        s = torch.sigmoid(beta * x)
        return x * s, s

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, beta = inputs
        _, s = output
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)  # no zeros for s
        ctx.save_for_backward(x, beta, s)

    @staticmethod
    def backward(ctx, g, _):
        x, beta, s = ctx.saved_tensors
        ds = s * (1 - s)
        return g * (s + x * beta * ds), (g * x * x * ds).sum()


class Generated(Composable):
    generate_vmap_rule = True


class OwnVmap(Composable):
    @staticmethod
    def backward(ctx, g, _):
        x, beta, s = ctx.saved_tensors
        ds = s * (1 - s)
        return g * (s + x * beta * ds), (g * x * x * ds).sum_to_size(beta.shape)

    @staticmethod
    def vmap(info, in_dims, x, beta):
        x_dim, beta_dim = in_dims
        if beta_dim is None:
            return OwnVmap.apply(x, beta), (x_dim, x_dim)
        x = (
            x.expand(info.batch_size, *x.shape)
            if x_dim is None
            else x.movedim(x_dim, 0)
        )
        beta = beta.reshape(-1, *[1] * (x.dim() - 1))
        return OwnVmap.apply(x, beta), (0, 0)


@torch.library.custom_op("gradtools_rivals::swish", mutates_args=())
def operator(x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(beta * x)
    return x * s, s


@operator.register_fake
def _(x, beta):
    return torch.empty_like(x), torch.empty_like(x)


def setup_context(ctx, inputs, output):
    x, beta = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, beta, s)


def backward(ctx, g, _):
    x, beta, s = ctx.saved_tensors
    ds = s * (1 - s)
    return g * (s + x * beta * ds), (g * x * x * ds).sum()


operator.register_autograd(backward, setup_context=setup_context)


@operator.register_vmap
def _(info, in_dims, x, beta):
    x_dim, beta_dim = in_dims
    if beta_dim is not None:
        beta = beta.reshape(-1, *[1] * (x.dim() - 1))
    return operator(x, beta), (x_dim, x_dim)


def swish_composable(x, beta):
    return Composable.apply(x, beta)[0]


def swish_generated(x, beta):
    return Generated.apply(x, beta)[0]


def swish_own_vmap(x, beta):
    return OwnVmap.apply(x, beta)[0]


def swish_operator(x, beta):
    return operator(x, beta)[0]


SWISH = contest.Contest(
    "swish",
    composite,
    lambda size, numbers: (numbers.normal(size), numbers.positive()),
    (0, 1),
    {
        contest.GRADTOOLS: swish,
        contest.COMBINED: Combined.apply,
        contest.COMPOSABLE: swish_composable,
        contest.GENERATED: swish_generated,
        contest.OWN_VMAP: swish_own_vmap,
        contest.CUSTOM_OP: swish_operator,
        contest.COMPOSITE: composite,
    },
)

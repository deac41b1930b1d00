"""An affine map and its square: parameters in a dict, and two results."""

import torch
from torch import Tensor
from torch.autograd import Function

import gradtools as gt
from tests.benchmarks.rivals import contest


def composite(x, params):
    y = x * params["scale"] + params["shift"]
    return y, y * y


@gt.custom_vjp
def affine(x, params):
    y = x * params["scale"] + params["shift"]
    return y, y * y


@affine.def_fwd
def _(x, params):
    scale = params["scale"]
    y = x * scale + params["shift"]
    return (y, y * y), (x, scale, y)


@affine.def_bwd
def _(residuals, g):
    x, scale, y = residuals
    g_y, g_square = g
    total = g_y + 2 * y * g_square
    return total * scale, {"scale": total * x, "shift": total}


class Combined(Function):
    @staticmethod
    def forward(ctx, x, scale, shift):
        y = x * scale + shift
        ctx.save_for_backward(x, scale, y)
        return y, y * y

    @staticmethod
    def backward(ctx, g_y, g_square):
        x, scale, y = ctx.saved_tensors
        total = g_y + 2 * y * g_square
        return total * scale, total * x, total


class Composable(Function):
    @staticmethod
    def forward(x, scale, shift):
        y = x * scale + shift
        return y, y * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, _ = inputs
        ctx.save_for_backward(x, scale, output[0])

    @staticmethod
    def backward(ctx, g_y, g_square):
        x, scale, y = ctx.saved_tensors
        total = g_y + 2 * y * g_square
        return total * scale, total * x, total


class Generated(Composable):
    generate_vmap_rule = True


class OwnVmap(Composable):
    """Broadcasts parameters that are shared over a batch."""

    @staticmethod
    def backward(ctx, g_y, g_square):
        x, scale, y = ctx.saved_tensors
        total = g_y + 2 * y * g_square
        shape = scale.shape
        return total * scale, (total * x).sum_to_size(shape), total.sum_to_size(shape)

    @staticmethod
    def vmap(info, in_dims, x, scale, shift):
        if in_dims[1:] != (None, None):
            raise NotImplementedError("a batch of parameters")
        return OwnVmap.apply(x.movedim(in_dims[0], 0), scale, shift), (0, 0)


@torch.library.custom_op("gradtools_rivals::affine", mutates_args=())
def operator(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    y = x * scale + shift
    return y, y * y


@operator.register_fake
def _(x, scale, shift):
    return torch.empty_like(x), torch.empty_like(x)


def setup_context(ctx, inputs, output):
    x, scale, _ = inputs
    ctx.save_for_backward(x, scale, output[0])


def backward(ctx, g_y, g_square):
    x, scale, y = ctx.saved_tensors
    total = g_y + 2 * y * g_square
    return total * scale, total * x, total


operator.register_autograd(backward, setup_context=setup_context)


@operator.register_vmap
def _(info, in_dims, x, scale, shift):
    if in_dims[1:] != (None, None):
        raise NotImplementedError("a batch of parameters")
    return operator(x.movedim(in_dims[0], 0), scale, shift), (0, 0)


# What an expert puts around a Function that takes tensors only.


def affine_combined(x, params):
    return Combined.apply(x, params["scale"], params["shift"])


def affine_composable(x, params):
    return Composable.apply(x, params["scale"], params["shift"])


def affine_generated(x, params):
    return Generated.apply(x, params["scale"], params["shift"])


def affine_own_vmap(x, params):
    return OwnVmap.apply(x, params["scale"], params["shift"])


def affine_operator(x, params):
    return operator(x, params["scale"], params["shift"])


def draw(size, numbers):
    params = {"scale": numbers.positive(size), "shift": numbers.normal(size)}
    return numbers.normal(size), params


AFFINE = contest.Contest(
    "affine",
    composite,
    draw,
    (0, 1),
    {
        contest.GRADTOOLS: affine,
        contest.COMBINED: affine_combined,
        contest.COMPOSABLE: affine_composable,
        contest.GENERATED: affine_generated,
        contest.OWN_VMAP: affine_own_vmap,
        contest.CUSTOM_OP: affine_operator,
        contest.COMPOSITE: composite,
    },
)

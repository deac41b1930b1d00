"""Kernels in Triton under a rule: a softmax over rows, its forward and its backward.

What autograd and vmap cannot look into is what custom rules are written for. A row is a
program; a batch is more rows, so that vmap is one launch. float32 and float64.

Importing this imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import gradtools as gt
from tests.benchmarks.ledger import Part
from tests.benchmarks.rivals.contest import COMBINED, GRADTOOLS, Contest
from tests.benchmarks.speed import Effort, compared, each_time, steps

ROWS, COLUMNS = 4096, (256, 1024, 4096)
WORK = "forward + backward"
TORCH = "torch.softmax"


# The kernels.


@triton.jit
def forward_kernel(out, x, columns, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    inside = place < columns
    begin = tl.program_id(0).to(tl.int64) * columns
    row = tl.load(x + begin + place, mask=inside, other=-float("inf"))
    powers = tl.exp(row - tl.max(row, 0))
    tl.store(out + begin + place, powers / tl.sum(powers, 0), mask=inside)


@triton.jit
def backward_kernel(out, y, g, columns, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    inside = place < columns
    begin = tl.program_id(0).to(tl.int64) * columns
    ys = tl.load(y + begin + place, mask=inside, other=0.0)
    gs = tl.load(g + begin + place, mask=inside, other=0.0)
    mean = tl.sum(ys * gs, 0)
    tl.store(out + begin + place, ys * (gs - mean), mask=inside)


def launched(kernel, *tensors: Tensor) -> Tensor:
    """Run a kernel on the rows of contiguous tensors, and return what it wrote."""
    out = torch.empty_like(tensors[0])
    if out.numel():
        columns = out.shape[-1]
        block = triton.next_power_of_2(columns)
        warps = min(max(block // 512, 4), 16)
        grid = (out.numel() // columns,)
        kernel[grid](out, *tensors, columns, BLOCK=block, num_warps=warps)
    return out


def softmax_of_rows(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension."""
    return launched(forward_kernel, x.contiguous())


def gradient_of_rows(y: Tensor, g: Tensor) -> Tensor:
    """Return the gradient of the argument, from a softmax and its gradient."""
    return launched(backward_kernel, y, g.contiguous())


# Their spellings.


@gt.custom_vjp(once_differentiable=True, vmap="broadcast_all")
def softmax(x):
    return torch.softmax(x, -1)


@softmax.def_fwd
def _(x):
    y = softmax_of_rows(x)
    return y, y


@softmax.def_bwd
def _(y, g):
    return gradient_of_rows(y, g)


class Combined(Function):
    @staticmethod
    def forward(ctx, x):
        y = softmax_of_rows(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return gradient_of_rows(y, g)


def composite(x):
    return torch.softmax(x, -1)


SPELLINGS = {GRADTOOLS: softmax, COMBINED: Combined.apply, TORCH: composite}


def contest(rows: int) -> Contest:
    """Return the contest of so many rows; its size is the number of columns."""
    return Contest(
        "softmax",
        composite,
        lambda columns, numbers: (numbers.normal(rows, columns),),
        (0,),
        SPELLINGS,
    )


def measure(effort: Effort, rows: int = ROWS, columns: Sequence[int] = COLUMNS) -> Part:
    """Compare the rule with the same kernels by hand, and with torch's own softmax."""
    rivals = contest(rows)
    found = effort.race(effort.rounds).run_rules(
        {
            f"{rows} x {size}": steps(rivals, size, effort.device, tuple(SPELLINGS))
            for size in columns
        }
    )
    return Part(
        [
            *compared("triton", WORK, found, GRADTOOLS, COMBINED),
            *compared("triton", WORK, found, GRADTOOLS, TORCH),
            *(
                row
                for spelling in SPELLINGS
                for row in each_time("triton", WORK, found, spelling)
            ),
        ]
    )

"""A fused SwiGLU in Triton: on a CUDA device, or in Python if TRITON_INTERPRET=1."""

import os

import torch

import gradtools as gt

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MISSING = None if triton else "no triton"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    MISSING = "no CUDA device"

if triton:

    @triton.jit
    def forward_kernel(out, a, b, count, BLOCK: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        x = tl.load(a + place, mask=inside, other=0.0)
        y = tl.load(b + place, mask=inside, other=0.0)
        tl.store(out + place, x / (1 + tl.exp(-x)) * y, mask=inside)

    @triton.jit
    def backward_kernel(da, db, g, a, b, count, BLOCK: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        u = tl.load(g + place, mask=inside, other=0.0)
        x = tl.load(a + place, mask=inside, other=0.0)
        y = tl.load(b + place, mask=inside, other=0.0)
        s = 1 / (1 + tl.exp(-x))
        tl.store(da + place, u * y * s * (1 + x * (1 - s)), mask=inside)
        tl.store(db + place, u * x * s, mask=inside)


def launched(kernel, *tensors):
    if count := tensors[0].numel():
        kernel[(triton.cdiv(count, 1024),)](*tensors, count, BLOCK=1024)


@gt.external(out=lambda g, a, b: (a, b), vmap="broadcast_all")
def swiglu_backward(g, a, b):
    out = torch.empty_like(a), torch.empty_like(b)
    launched(backward_kernel, *out, g, a, b)
    return out


# Element by element: a batch is more elements.
@gt.external(out=lambda a, b: a, vmap="broadcast_all", gradient=swiglu_backward)
def swiglu(a, b):
    out = torch.empty_like(a)
    launched(forward_kernel, out, a, b)
    return out


def main(size=1000):
    if MISSING:
        return print(f"not run: {MISSING}")
    a, b = torch.randn(2, 3, size, device=DEVICE)
    by_torch = lambda a, b: torch.nn.functional.silu(a) * b
    slopes = lambda f: torch.func.grad(lambda a, b: f(a, b).square().sum(), (0, 1))
    right = torch.cat(slopes(by_torch)(a, b))
    gap = lambda slopes: (torch.cat(slopes(a, b)) - right).abs().max().item()
    ours = slopes(swiglu)
    found = {"grad": gap(ours), "vmap(grad)": gap(torch.func.vmap(ours))}
    print("largest difference from torch:", found, swiglu.reports[0], sep="\n")
    return found


if __name__ == "__main__":
    main()

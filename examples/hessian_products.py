"""Hessian-vector products of f(x) = x^T A x, with A not symmetric.

The gradient is (A + A^T) x and the Hessian A + A^T; 2 A x is right for a symmetric A
only. x is a vector, or a batch of them.
"""

import torch

import gradtools as gt


@gt.custom_vjp
def quadratic(x, A):
    return (x @ A * x).sum(-1)


@quadratic.def_bwd
def _(residuals, g, *, needs):
    (x, A), _ = residuals
    dx = g[..., None] * (x @ A + x @ A.T) if needs[0] else None
    dA = (g[..., None] * x).T @ x if needs[1] and x.ndim == 2 else None
    if needs[1] and x.ndim == 1:
        dA = g * torch.outer(x, x)
    return dx, dA


torch.manual_seed(0)
A = torch.randn(6, 6)
x, v = torch.randn(6), torch.randn(6)
f = lambda x: quadratic(x, A)
ways = {
    "reverse over reverse": gt.hvp(f, (x,), (v,)),
    "forward over reverse": gt.jvp(gt.grad(f), (x,), (v,))[1],
    "an operator": gt.hvp_fn(f, x)(v),
}
exact = (A + A.T) @ v
for name, product in ways.items():
    print(f"{name:<21} off by {(product - exact).abs().max():.1e}")

batch = torch.randn(32, 6)
one_call = gt.grad(lambda x: f(x).sum())(batch)
by_vmap = gt.vmap(gt.grad(f))(batch)
print(f"a batch, two ways     off by {(one_call - by_vmap).abs().max():.1e}")

report = quadratic.gradcheck(x, A)  # all that it can be asked, on demand
print(report)

solution, info = gt.cg(gt.hvp_fn(lambda x: f(x) ** 2 + x @ x, x), v)
print("cg converged:", info.converged.item(), "after", info.iterations.item())

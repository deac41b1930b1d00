"""Hessian-vector products of f(x) = x^T A x, with A not symmetric.

The gradient is (A + A^T) x and the Hessian A + A^T; 2 A x is right for a symmetric A
only. So ``probe=`` has the rule checked on one that is not, whatever a call brings.
x is a vector, or a batch of them.
"""

import torch

import gradtools as gt


@gt.custom_vjp(probe=lambda: (torch.randn(5, 6), torch.randn(6, 6)))
def quadratic(x, A):
    return (x @ A * x).sum(-1)


@quadratic.def_bwd
def _(residuals, g, *, needs):
    (x, A), _ = residuals
    g = g.unsqueeze(-1)
    rows = x.reshape(-1, len(A))
    return (
        g * (x @ A + x @ A.T) if needs[0] else None,
        (g * x).reshape(-1, len(A)).T @ rows if needs[1] else None,
    )


torch.manual_seed(0)
A, x, v = torch.randn(6, 6), torch.randn(6), torch.randn(6)
f = lambda x: quadratic(x, A)
ways = {
    "reverse over reverse": gt.hvp(f, (x,), (v,))[0],
    "forward over reverse": gt.jvp(gt.grad(f), (x,), (v,))[1],
    "an operator": gt.hvp_fn(f, x)(v),
}
errors = {way: (got - (A + A.T) @ v).abs().max().item() for way, got in ways.items()}
for way, error in errors.items():
    print(f"{way:<21} off by {error:.1e}")

batch = torch.randn(32, 6)
gradients = {
    "in one call": gt.grad(lambda x: f(x).sum())(batch),
    "by vmap": gt.vmap(gt.grad(f))(batch),
}
for way, found in gradients.items():
    off = (found - batch @ (A + A.T)).abs().max()
    print(f"a batch, {way:<12} off by {off:.1e}")

report = quadratic.gradcheck(batch, A)  # everything, now: second order, vmap, jvp
print(report.headline)

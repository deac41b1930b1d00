"""gather and scatter: each is the derivative of the other.

Rows of a table are read by integer positions; what comes back is added up where a row
was read more than once. The two rules call each other, so that every order is served.
"""

import torch
import torch.nn.functional as F

import gradtools as gt


@gt.custom_vjp
def gather(table, rows):
    return table[rows]


@gt.custom_vjp
def scatter_add(values, rows, count):
    return values.new_zeros(count, values.shape[-1]).index_add(0, rows, values)


@gather.def_bwd
def _(residuals, g):
    (table, rows), _ = residuals
    return scatter_add(g, rows, len(table)), None  # positions have no gradient


@scatter_add.def_bwd
def _(residuals, g):
    (_, rows, _), _ = residuals
    return gather(g, rows), None, None


torch.manual_seed(0)
table, rows = torch.randn(5, 3), torch.tensor([0, 2, 2, 4, 2])
loss = lambda lookup: lambda table: lookup(table).pow(3).sum()
mine, theirs = loss(lambda t: gather(t, rows)), loss(lambda t: F.embedding(rows, t))
first = gt.grad(mine)(table) - gt.grad(theirs)(table)
second = gt.hessian(mine)(table) - gt.hessian(theirs)(table)
print(f"gradient off by {first.abs().max():.1e} from torch's embedding,", end=" ")
print(f"second derivative by {second.abs().max():.1e}")
reads = gt.grad(lambda t: gather(t, rows).sum())(table)[:, 0]
print("a row gets as much as it was read:", reads.tolist())

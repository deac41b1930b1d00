"""gather and scatter: each is the derivative of the other.

A table of embeddings is read by integer positions; what comes back is added up where a
position was read more than once. Both are stated as rules, each with the other for bwd.
"""

import torch

import gradtools as gt


@gt.custom_vjp
def gather(table, rows):
    return table[rows]


@gt.custom_vjp
def scatter_add(values, rows, count):
    zeros = values.new_zeros(count, *values.shape[1:])
    return zeros.index_add(0, rows, values)


@gather.def_bwd
def _(residuals, g):
    (table, rows), _ = residuals
    return scatter_add(g, rows, len(table)), None


@scatter_add.def_bwd
def _(residuals, g):
    (_, rows, _), _ = residuals
    return gather(g, rows), None, None

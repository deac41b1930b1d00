"""ReLU, to save memory: what an edit in place would save, the pure form saves too.

The derivative can be read off the output, which the next layer keeps anyway. So the
input is nobody's after the call, and its memory is free without writing into it.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import gradtools as gt


@gt.custom_vjp(once_differentiable=True)  # else the input is kept, for second order
def relu(x):
    return x.clamp(min=0)


@relu.def_fwd
def _(x):
    out = x.clamp(min=0)
    return out, out  # an output is kept as itself, not as a copy


@relu.def_bwd
def _(out, g):
    return g * (out > 0)


@gt.custom_vjp
def relu_of_input(x):
    return x.clamp(min=0)


@relu_of_input.def_bwd
def _(residuals, g):
    (x,), _ = residuals
    return g * (x > 0)


torch.manual_seed(0)
x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))


def network(x, activation):
    for layer in layers:
        x = activation(layer(x))
    return x


def kept(activation):
    """Return the bytes that autograd keeps for a backward, each memory once."""
    storages = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    held, total = [x], 0

    def pack(tensor):
        nonlocal total
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in storages:
            storages.add(memory.data_ptr())
            held.append(tensor)  # else its address may be given away again
            total += memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x, activation)
    return total


network(x, relu), network(x, relu_of_input)  # the checks, which keep nothing
in_place = kept(lambda x: F.relu(x, inplace=True))
memory = {f.__name__: kept(f) for f in (relu, relu_of_input)}
print(f"torch's relu in place  {in_place / 2**20:5.2f} MiB kept for 8 layers")
for name, size in memory.items():
    print(f"{name:<22} {size / 2**20:5.2f} MiB")

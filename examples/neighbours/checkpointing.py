"""torch.utils.checkpoint: rules in a region that is computed twice.

The rule keeps nothing in the first pass; its bwd runs on the residuals of the second.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradtools as gt


@gt.custom_vjp
def swish(x, beta):
    """Return ``x * sigmoid(beta * x)``."""
    return x * torch.sigmoid(beta * x)


@swish.def_bwd
def _(residuals, g):
    ((x, beta), _) = residuals
    s = torch.sigmoid(beta * x)
    ds = s * (1 - s)
    return g * (s + x * beta * ds), (g * x * x * ds).sum()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.beta = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x + self.dropout(swish(self.linear(x), self.beta))


def gradients(blocks, x, *, again):
    """Return the gradients of all parameters, and how many bytes were kept for them."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # for the dropout
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = x
        for block in blocks:
            out = checkpoint(block, out, use_reentrant=False) if again else block(out)
        loss = out.square().mean()
    return torch.autograd.grad(loss, list(blocks.parameters())), sum(kept.values())


def main(width=64, depth=6):
    """Return gradients and bytes, without and with recomputation."""
    torch.manual_seed(1)
    blocks = nn.ModuleList(Block(width) for _ in range(depth))
    x = torch.randn(256, width)
    return gradients(blocks, x, again=False), gradients(blocks, x, again=True)


if __name__ == "__main__":
    for found, kept in main():
        print(f"norm {torch.stack([g.norm() for g in found]).norm():.6f}, {kept} bytes")

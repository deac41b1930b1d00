"""Modules in the manner of HF transformers: a rule inside, a ModelOutput outside.

``ModelOutput`` does what transformers' class does: it is an OrderedDict of the fields
that are not None, and a pytree. A rule returns it; cotangents come in the same class.
"""

import dataclasses
from collections import OrderedDict

import torch
from torch import nn
from torch.utils import _pytree

import gradtools as gt


class ModelOutput(OrderedDict):
    """What a model returns; fields by attribute and by name."""

    def __init_subclass__(cls):
        _pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
        )

    def __post_init__(self):
        self.update({k: v for k, v in vars(self).items() if v is not None})


@dataclasses.dataclass
class ClassifierOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@gt.custom_vjp
def head(hidden, weight):
    return ClassifierOutput(logits=hidden @ weight, hidden=hidden)


@head.def_fwd
def _(hidden, weight):
    return head(hidden, weight), (hidden, weight)


@head.def_bwd
def _(residuals, g):
    hidden, weight = residuals
    return g.logits @ weight.mT + g.hidden, hidden.mT @ g.logits


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.weight = nn.Parameter(torch.randn(16, 3) / 4)

    def forward(self, inputs, labels):
        out = head(torch.tanh(self.body(inputs)), self.weight)
        loss = nn.functional.cross_entropy(out.logits, labels)
        return ClassifierOutput(loss, out.logits, out.hidden)


def main(steps=60):
    """Train the classifier; return its losses."""
    model, inputs = Classifier(), torch.randn(96, 8)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.05), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model(inputs, inputs[:, :3].argmax(1)).loss)
        losses[-1].backward()
        optimizer.step()
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    print("{:.3f} ... {:.3f}".format(*main(steps=2)))

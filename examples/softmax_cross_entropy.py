"""Softmax and cross-entropy in one rule: its derivative is p - y.

What is kept is the probabilities; the labels are integers, and get no gradient without
a word about it.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradtools as gt


@gt.custom_vjp
def cross_entropy(logits, labels):
    shifted = logits - logits.amax(-1, keepdim=True)
    picked = shifted.gather(-1, labels[:, None])[:, 0]
    return (shifted.exp().sum(-1).log() - picked).mean()


@cross_entropy.def_fwd
def _(logits, labels):
    log_p = logits.log_softmax(-1)
    loss = -log_p.gather(-1, labels[:, None]).mean()
    return loss, (log_p.exp(), labels)


@cross_entropy.def_bwd
def _(residuals, g):
    p, labels = residuals
    return g / len(labels) * (p - F.one_hot(labels, p.shape[-1])), None


images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
w = torch.zeros(64, 10, requires_grad=True)
optimizer = torch.optim.LBFGS([w], max_iter=30)


def closure():
    optimizer.zero_grad()
    loss = cross_entropy(x[:1400] @ w, y[:1400])
    loss.backward()
    return loss


optimizer.step(closure)
accuracy = ((x[1400:] @ w).argmax(1) == y[1400:]).double().mean().item()
logits = (x[:100] @ w).detach()
gap = gt.grad(cross_entropy)(logits, y[:100]) - gt.grad(F.cross_entropy)(
    logits, y[:100]
)
print(
    f"test accuracy {accuracy:.1%}; gradient off by {gap.abs().max():.1e} from torch's"
)
print(cross_entropy.reports[0])

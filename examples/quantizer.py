"""Weights of two bits: rounded in the forward, straight through in the backward.

Rounding has the derivative zero, so nothing would be learned. ``straight_through``
gives it the identity's, and says so in its contract: it is no derivative, and is not
reported as one.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradtools as gt

rounded = gt.straight_through(torch.round)


def quantize(w, levels=1):
    scale = w.detach().abs().mean() * 2
    return rounded(w.div(scale).clamp(-1, 1) * levels) * scale / levels


images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def trained(quantize):
    torch.manual_seed(0)
    u, v = torch.randn(64, 64) / 8, torch.randn(64, 10) / 8
    parameters = [u.requires_grad_(), v.requires_grad_()]
    network = lambda x: (x @ quantize(u)).relu() @ quantize(v)
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(30):
        for rows in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    accuracy = (network(x[1400:]).argmax(1) == y[1400:]).double().mean().item()
    return accuracy, quantize(u).unique().numel()


full, _ = trained(lambda w: w)
low, values = trained(quantize)
print(f"accuracy {full:.1%} in full precision, {low:.1%} with {values} weights")
print(rounded.reports[0])

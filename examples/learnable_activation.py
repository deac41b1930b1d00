"""A learnable activation, ``x * sigmoid(beta * x)``, trained on digits.

beta is one number, or one per channel; its gradient is summed over whatever beta was
broadcast along. The check of the rule runs by itself, at the first call.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import gradtools as gt


@gt.custom_vjp
def swish(x, beta):
    return x * torch.sigmoid(beta * x)


@swish.def_fwd
def _(x, beta):
    s = torch.sigmoid(beta * x)
    return x * s, (x, beta, s)  # s is kept, so that bwd needs no sigmoid


@swish.def_bwd
def _(residuals, g, *, needs):
    x, beta, s = residuals
    ds = s * (1 - s)
    return (
        g * (s + x * beta * ds) if needs[0] else None,
        (g * x * x * ds).sum_to_size(beta.shape) if needs[1] else None,
    )


class Swish(nn.Module):
    def __init__(self, *channels):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels))  # Swish(): one for all

    def forward(self, x):
        return swish(x, self.beta)


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
model = nn.Sequential(
    nn.Linear(64, 48), Swish(48), nn.Linear(48, 32), Swish(), nn.Linear(32, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(20):
    for rows in torch.randperm(1400).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()

accuracy = (model(x[1400:]).argmax(1) == y[1400:]).double().mean().item()
print(f"test accuracy {accuracy:.1%}, beta went from 1 to", end=" ")
print(f"{model[3].beta.item():.2f} (one for all),", end=" ")
print(f"{model[1].beta.min():.2f} to {model[1].beta.max():.2f} (one per channel)")
for report in swish.reports:
    print(report.headline, "|", report.signature)

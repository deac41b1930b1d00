"""Inside a trained network: gradients of single digits, and the sharpest direction.

The activation is a rule. vmap gives the gradient of every digit's own loss at once, and
a second derivative through the rule gives the top eigenvalue of the Hessian.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradtools as gt


@gt.custom_vjp
def swish(x, beta):
    return x * torch.sigmoid(beta * x)


@swish.def_bwd
def _(residuals, g):
    (x, beta), _ = residuals
    s = torch.sigmoid(beta * x)
    h = g * x * s * (1 - s)
    return g * s + beta * h, (h * x).sum()


def loss(params, x, y, activation=swish):
    hidden = activation(x @ params["inner"], params["beta"])
    return F.cross_entropy(hidden @ params["outer"], y)


plain = lambda x, beta: x * torch.sigmoid(beta * x)  # for autograd to differentiate
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
params = {"inner": torch.randn(64, 64) / 8, "outer": torch.randn(64, 10) / 8}
params["beta"] = torch.tensor(1.0)
for _ in range(200):
    slope = gt.grad(loss)(params, x[:1400], y[:1400])
    params = {name: p - 0.5 * slope[name] for name, p in params.items()}
x, y = x[1400:], y[1400:]

each = gt.vmap(gt.grad(loss), (None, 0, 0))(params, x, y)
pairs = zip(x, y, strict=True)
one_by_one = [torch.func.grad(loss)(params, *pair, plain) for pair in pairs]
difference = max(
    (each[name] - torch.stack([slope[name] for slope in one_by_one])).abs().max().item()
    for name in params
)
norms = sum(g.flatten(1).square().sum(1) for g in (each["inner"], each["outer"])).sqrt()
hardest = norms.topk(4).indices
print(f"gradients of {len(y)} digits off by {difference:.1e} from a loop of autograd")
print(
    f"median norm {norms.median():.1e}, largest", *(f"{n:.1f}" for n in norms[hardest])
)

eigs = lambda f: gt.hessian_eigs(lambda p: loss(p, x, y, f), params, k=1).values
top = {"the rule": eigs(swish).item(), "autograd": eigs(plain).item()}
for name, value in top.items():
    print(f"top eigenvalue of the Hessian {value:.6g} by {name}")

try:
    from matplotlib.figure import Figure
except ImportError:
    print("no figure: matplotlib is not installed")
else:
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    first, *rest = figure.subplots(1, 5, width_ratios=[2, 1, 1, 1, 1])
    first.hist(norms.clamp(min=1e-9).log10().numpy(), 30)
    first.set(title="gradients of single digits", xlabel="log10 of the norm")
    for axes, index in zip(rest, hardest.tolist(), strict=True):
        axes.imshow(x[index].reshape(8, 8).numpy(), cmap="gray_r")
        axes.set(xticks=[], yticks=[], title=f"a {y[index]}")
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/inside_a_network.png", dpi=130)

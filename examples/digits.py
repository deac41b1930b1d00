"""Handwritten digits, classified by a network whose activations are custom rules.

Two rules are stated, a swish with a learnable slope and a layer norm. Then the same
network is trained, differentiated per sample, twice, and compiled. Run it with
``make demo``, or ``python examples/digits.py`` where the extra ``demo`` is installed.
"""

import statistics
import time
from pathlib import Path

import matplotlib as mpl
import torch
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

import gradtools as gt

mpl.use("Agg")
from matplotlib import pyplot as plt

console = Console(highlight=False, soft_wrap=True)


# The rules: two pure functions each, and no context.


@gt.custom_vjp
def swish(x, beta):
    """Return x * sigmoid(beta * x)."""
    return x * torch.sigmoid(beta * x)


@swish.def_fwd
def _(x, beta):
    s = torch.sigmoid(beta * x)
    return x * s, (x, beta, s)


@swish.def_bwd
def _(residuals, g):
    x, beta, s = residuals
    ds = s * (1 - s)
    return g * (s + x * beta * ds), (g * x * x * ds).sum()


@gt.custom_vjp
def layer_norm(x, weight, bias, eps=1e-5):
    """Return x with zero mean and unit variance along its last axis, then scaled."""
    return normalized(x, eps)[0] * weight + bias


@layer_norm.def_fwd
def _(x, weight, bias, eps=1e-5):
    xhat, rstd = normalized(x, eps)
    return xhat * weight + bias, (xhat, rstd, weight)


@layer_norm.def_bwd
def _(residuals, g):
    xhat, rstd, weight = residuals
    gx = g * weight
    along = (gx * xhat).mean(-1, keepdim=True)
    gx = rstd * (gx - gx.mean(-1, keepdim=True) - xhat * along)
    gweight = (g * xhat).sum_to_size(weight.shape)
    return gx, gweight, g.sum_to_size(weight.shape), None


def normalized(x, eps):
    rstd = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return (x - x.mean(-1, keepdim=True)) * rstd, rstd


# The network; ``native`` has torch's own operations in place of the rules.


class Classifier(nn.Module):
    def __init__(self, hidden=64, *, native=False):
        super().__init__()
        self.inner, self.outer = nn.Linear(64, hidden), nn.Linear(hidden, 10)
        self.weight, self.bias = (
            nn.Parameter(torch.ones(hidden)),
            nn.Parameter(torch.zeros(hidden)),
        )
        self.beta = nn.Parameter(torch.tensor(1.0))
        self.native = native

    def forward(self, x):
        h = self.inner(x)
        if self.native:
            h = F.layer_norm(h, self.weight.shape, self.weight, self.bias)
            return self.outer(h * torch.sigmoid(self.beta * h))
        return self.outer(swish(layer_norm(h, self.weight, self.bias), self.beta))


def loss_of(model):
    """Return the loss as a function of parameters and data."""
    return lambda params, x, y: F.cross_entropy(functional_call(model, params, (x,)), y)


def data():
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.data, dtype=torch.get_default_dtype())[order] / 16
    y = torch.tensor(digits.target)[order]
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def train(model, train_set, test_set, epochs):
    """Train with Adam; return loss and test accuracy per epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in track(range(epochs), "training", console=console):
        for x, y in zip(*(part.split(64) for part in train_set), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = (model(test_set[0]).argmax(-1) == test_set[1]).float().mean()
        history.append((loss.item(), right.item()))
    return history


def per_sample_gradients(model, x, y):
    """Return the gradients of each sample's loss, by vmap(grad)."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    loss = loss_of(model)
    return vmap(grad(loss), (None, 0, 0))(params, x, y)


def difference_from_a_loop(model, gradients, x, y):
    """Return the largest difference from one ``backward`` per sample."""
    worst = 0.0
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i]), y[i])
        alone = torch.autograd.grad(loss, tuple(model.parameters()))
        for a, b in zip(alone, gradients.values(), strict=True):
            worst = max(worst, (a - b[i]).abs().max().item())
    return worst


def forward_over_reverse(model, x, y):
    """Return the Hessian-vector product of the loss, by jvp(grad)."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    gradient = grad(lambda params: loss_of(model)(params, x, y))
    return lambda v: jvp(gradient, (params,), (v,))[1]


def reverse_over_reverse(model, x, y):
    """Return the same product by two backward passes."""
    params = dict(model.named_parameters())
    loss = loss_of(model)(params, x, y)
    first = torch.autograd.grad(loss, list(params.values()), create_graph=True)

    def hvp(v):
        along = sum((g * u).sum() for g, u in zip(first, v.values(), strict=True))
        second = torch.autograd.grad(along, list(params.values()), retain_graph=True)
        return dict(zip(params, second, strict=True))

    return hvp


def top_eigenvalue(hvp, like, steps):
    """Return the Rayleigh quotients of a power iteration."""
    torch.manual_seed(1)
    v = {name: torch.randn_like(p) for name, p in like.items()}
    quotients = []
    for _ in range(steps):
        norm = sum(part.square().sum() for part in v.values()).sqrt()
        v = {name: part / norm for name, part in v.items()}
        hv = hvp(v)
        quotients.append(sum((v[name] * hv[name]).sum() for name in v).item())
        v = hv
    return quotients


def medians(repeats, *steps):
    """Time functions in turn; return the median of each, in seconds."""
    times = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(repeats):
        for step, found in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def speed(model, x, y, repeats):
    """Return the times of an eager and of a compiled training step."""
    compiled = torch.compile(model, fullgraph=True)

    def step(network):
        F.cross_entropy(network(x), y).backward()
        model.zero_grad()

    return medians(repeats, lambda: step(model), lambda: step(compiled))


def draw(path, history, gradients, test_set, quotients):
    """Draw training, the gradients of single samples and the power iteration."""
    norms = sum(
        g.reshape(len(g), -1).square().sum(1) for g in gradients.values()
    ).sqrt()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    losses, rights = zip(*history, strict=True)
    epochs = range(1, len(history) + 1)
    axes[0].plot(epochs, losses, color="tab:blue")
    axes[0].set(title="Training", xlabel="epoch", yscale="log")
    axes[0].set_ylabel("loss of the last batch", color="tab:blue")
    right = axes[0].twinx()
    right.plot(epochs, [100 * r for r in rights], color="tab:orange")
    right.set_ylabel("test accuracy (%)", color="tab:orange")
    counts, *_ = axes[1].hist(
        norms.clamp(min=1e-6).log10().numpy(), 30, color="tab:green"
    )
    axes[1].set(
        title="Gradients of single test samples",
        xlabel="log10 of the gradient's norm (drawn: the four largest)",
        ylabel="samples",
        ylim=(0, 1.5 * max(counts)),
    )
    for place, index in enumerate(norms.topk(4).indices):
        inset = axes[1].inset_axes((0.1 + 0.21 * place, 0.76, 0.17, 0.2))
        inset.imshow(test_set[0][index].reshape(8, 8).numpy(), cmap="gray_r")
        inset.set_xticks([])
        inset.set_yticks([])
        inset.set_xlabel(f"a {test_set[1][index]}", labelpad=1)
    axes[2].plot(range(1, len(quotients) + 1), quotients, "o-", markersize=3)
    axes[2].set(
        title=f"Top Hessian eigenvalue: {quotients[-1]:.3g}",
        xlabel="Hessian-vector products",
        ylabel="Rayleigh quotient",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(epochs=40, samples=100, steps=20, repeats=200, path="build/digits.png"):
    """Run everything; return the figures that are printed."""
    torch.manual_seed(0)
    train_set, test_set = data()
    model = Classifier()
    history = train(model, train_set, test_set, epochs)
    console.print(f"test accuracy          {history[-1][1]:.1%}")
    for rule in (swish, layer_norm):
        for report in rule.reports:
            console.print(f"checked on first call  {report}")

    x, y = (part[:samples] for part in test_set)
    gradients = per_sample_gradients(model, x, y)
    difference = difference_from_a_loop(model, gradients, x, y)
    console.print(f"per-sample gradients   vmap(grad) - loop: at most {difference:.1e}")

    params = dict(model.named_parameters())
    quotients = top_eigenvalue(forward_over_reverse(model, *train_set), params, steps)
    native = Classifier(native=True)
    native.load_state_dict(model.state_dict())
    reference = top_eigenvalue(reverse_over_reverse(native, *train_set), params, steps)
    console.print(
        f"top Hessian eigenvalue {quotients[-1]:.6g} by forward over reverse; "
        f"{reference[-1]:.6g} with torch's own operations, reverse over reverse"
    )

    eager, compiled = speed(model, *(part[:64] for part in train_set), repeats)
    console.print(
        f"training step          {eager * 1e6:.0f} us eager, {compiled * 1e6:.0f} us "
        f"compiled: {eager / compiled:.2f} times as fast"
    )
    everyone = per_sample_gradients(model, *test_set)
    draw(Path(path), history, everyone, test_set, quotients)
    console.print(f"figure                 {path}")
    return {
        "accuracy": history[-1][1],
        "difference": difference,
        "eigenvalues": (quotients[-1], reference[-1]),
    }


if __name__ == "__main__":
    main()

"""The sharpness of the loss while a network is trained: the largest Hessian eigenvalue.

Gradient descent of the whole batch sharpens the loss until the eigenvalue hovers about
2 / learning rate, where it begins to oscillate: the edge of stability (J. Cohen et al.,
2021).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import gradtools as gt


def loss(params, x, y):
    hidden = torch.tanh(x @ params["w1"])
    return F.mse_loss(torch.tanh(hidden @ params["w2"]) @ params["w3"], y)


def trained(rate, steps, every, count=200):
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:count]) / 16
    y = F.one_hot(torch.tensor(labels[:count]), 10).double()
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (64, 32), "w2": (32, 32), "w3": (32, 10)}
    params = {
        key: torch.randn(shape, generator=generator).double() / shape[0] ** 0.5
        for key, shape in shapes.items()
    }
    history = []
    for step in range(steps):
        value, slope = gt.value_and_grad(loss)(params, x, y)
        if step % every == 0:
            top = gt.hessian_eigs(
                lambda p: loss(p, x, y), params, k=2, tol=1e-3, generator=generator
            )
            history.append((step, value.item(), *top.values.tolist()))
            print(f"step {step}: loss {value:.4f}, sharpness {top.values[0]:.2f}")
        params = {key: p - rate * slope[key] for key, p in params.items()}
    return history


def draw(histories, path):
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for number, (rate, history) in enumerate(histories.items()):
        color = f"C{number}"
        steps, _, first, _ = zip(*history, strict=True)
        axes.plot(steps, first, color=color, label=f"learning rate {rate:g}")
        axes.axhline(2 / rate, color=color, linestyle=":", linewidth=1)
        axes.annotate(
            "2 / rate", (steps[-1], 2 / rate), color=color, va="bottom", ha="right"
        )
    axes.set(xlabel="step", ylabel="largest eigenvalue", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(steps=1500, every=75, rates=(1.0, 0.5), path=Path("sharpness.png")):
    histories = {rate: trained(rate, steps, every) for rate in rates}
    draw(histories, path)
    return histories


if __name__ == "__main__":
    main()

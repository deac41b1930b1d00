"""What digits.py measures and draws with."""

import statistics
import time
from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt


def power_iteration(hvp, params, steps):
    """Return the Rayleigh quotients, which lead to the top eigenvalue."""
    generator, quotients = torch.Generator().manual_seed(1), []
    v = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
    for _ in range(steps):
        norm = sum(part.square().sum() for part in v.values()).sqrt()
        unit = {name: part / norm for name, part in v.items()}
        v = hvp(unit)
        quotients.append(sum((unit[name] * v[name]).sum() for name in v).item())
    return quotients


def medians(repeats, *steps):
    """Time functions in turn; return the median of each, in microseconds."""
    times = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(repeats):
        for step, found in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            found.append(1e6 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def draw(path, history, test_set, gradients, quotients):
    """Write the figure.

    Args:
        path: Where to; its folder is made.
        history: Loss and test accuracy after each epoch.
        test_set: The digits, ``(samples, 64)``, and their names.
        gradients: The gradient of each digit's loss, ``(samples, ...)`` per parameter.
        quotients: The Rayleigh quotient after each Hessian-vector product.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15)
    training(axes[0], *zip(*history, strict=True))
    squares = (g.reshape(len(g), -1).square().sum(1) for g in gradients.values())
    norms = sum(squares).sqrt()
    single_samples(axes[1], norms, *test_set)
    axes[2].plot(range(1, len(quotients) + 1), quotients, "o-", markersize=3)
    axes[2].set(
        title=f"Top Hessian eigenvalue: {quotients[-1]:.3g}",
        xlabel="Hessian-vector products",
        ylabel="Rayleigh quotient",
    )
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def training(axes, losses, accuracies):
    epochs = range(1, len(losses) + 1)
    axes.semilogy(epochs, losses, color="tab:blue")
    axes.set(title="Training", xlabel="epoch")
    axes.set_ylabel("mean training loss (nats)", color="tab:blue")
    right = axes.twinx()
    right.plot(epochs, [100 * a for a in accuracies], color="tab:orange")
    right.set_ylabel("test accuracy (%)", color="tab:orange")


def single_samples(axes, norms, digits, names):
    counts, *_ = axes.hist(norms.clamp(min=1e-9).log10(), 30, color="tab:green")
    axes.set(
        title="Gradients of single test digits",
        xlabel="log10 of the gradient's norm",
        ylabel="digits",
        ylim=(0, 1.55 * max(counts)),
    )
    axes.text(0.5, 0.95, "the four largest:", ha="center", transform=axes.transAxes)
    for place, index in enumerate(norms.topk(4).indices):
        inset = axes.inset_axes((0.1 + 0.21 * place, 0.73, 0.17, 0.2))
        inset.imshow(digits[index].reshape(8, 8).numpy(), cmap="gray_r")
        inset.set(xticks=[], yticks=[])
        inset.set_xlabel(f"a {names[index]}", labelpad=1)

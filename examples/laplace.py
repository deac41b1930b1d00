"""How sure a network is: the Laplace approximation with a diagonal Hessian.

The posterior of the weights is taken for a Gaussian around the trained ones, with the
inverse of the Hessian of the loss for its variance (D. MacKay, 1992); here of its
diagonal, exactly and by Hutchinson's estimate.
"""

import torch
from sklearn.datasets import load_diabetes

import gradtools as gt

NOISE, PRIOR = 0.5, 1.0


def network(params, x):
    return (torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]).squeeze(-1)


def energy(params, x, y):
    """Return minus the logarithm of the posterior, up to a constant."""
    misfit = (network(params, x) - y).square().sum() / (2 * NOISE**2)
    return misfit + sum(p.square().sum() for p in params.values()) / (2 * PRIOR**2)


def trained(params, x, y, steps=150):
    for _ in range(steps):
        with gt.ggnvp_fn(
            lambda p: network(p, x),
            lambda out: (out - y).square().sum() / (2 * NOISE**2),
            params,
        ) as matrix:
            slope = gt.grad(energy)(params, x, y)
            step, _ = gt.cg(matrix, slope, damping=1 / PRIOR**2 + 20.0)
        params = {key: p - step[key] for key, p in params.items()}
    return params


def main():
    data, target = load_diabetes(return_X_y=True)
    x = torch.tensor(data[:, [2, 8]])  # body mass and a measure of the blood
    x, y = (x - x.mean(0)) / x.std(0), torch.tensor(target)
    y = (y - y.mean()) / y.std()
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.5 * torch.randn(shape, generator=generator).double()
    start = {"w1": draw(2, 12), "b1": draw(12), "w2": draw(12, 1)}
    params = trained(start, x, y)
    f = lambda params: energy(params, x, y)
    exact = gt.hessian_diag(f, params).value
    estimate = gt.hessian_diag(
        f, params, method="hutchinson", samples=400, generator=generator
    )
    parts = ((estimate.value[k] - exact[k]) / estimate.stderr[k] for k in params)
    off = torch.cat([part.flatten() for part in parts])
    # a diagonal entry may be small or below zero where the mode is not quite reached
    deviation = {k: d.clamp(min=1 / PRIOR**2).rsqrt() for k, d in exact.items()}

    def spread(x, samples=500):
        """Return the standard deviation of predictions over sampled weights."""
        noise = {
            key: torch.randn(samples, *s.shape, generator=generator).double() * s
            for key, s in deviation.items()
        }
        sampled = {key: p + noise[key] for key, p in params.items()}
        return gt.vmap(network, in_dims=(0, None))(sampled, x).std(0)

    found = {
        "gradient": max(g.abs().max().item() for g in gt.grad(f)(params).values()),
        "typical error of the estimate, in its own": off.square().mean().sqrt().item(),
        "spread at the data": spread(x).mean().item(),
        "spread far away": spread(8 * x).mean().item(),
    }
    print(found)
    return found


if __name__ == "__main__":
    main()

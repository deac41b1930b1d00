"""Logistic regression by Newton's method, with conjugate gradients for its steps.

Each step solves ``H d = -g`` by Hessian-vector products alone: the Hessian of 650
numbers is never made. The optimum is scikit-learn's.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import gradtools as gt

L2 = 0.01


def data():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images) / 16, torch.tensor(labels)


def loss(params, x, y):
    logits = x @ params["weight"].T + params["bias"]
    return F.cross_entropy(logits, y) + L2 / 2 * params["weight"].square().sum()


def newton(params, x, y, steps=20, tolerance=1e-9):
    history = []
    for _ in range(steps):
        with gt.hvp_fn(lambda params: loss(params, x, y), params) as hessian:
            size = torch.cat([g.flatten() for g in hessian.grad.values()]).norm()
            history.append(size.item())
            if size < tolerance:
                break
            # damped: a shift of all biases changes nothing, so H is singular
            step, info = gt.cg(hessian, hessian.grad, damping=1e-6, rtol=min(0.1, size))
        print(f"|gradient| = {size:8.1e}   {info.iterations.item():3d} products")
        params = {key: p - step[key] for key, p in params.items()}
    return params, history


def main():
    x, y = data()
    zeros = {"weight": torch.zeros(10, 64).double(), "bias": torch.zeros(10).double()}
    params, history = newton(zeros, x, y)
    model = LogisticRegression(C=1 / (L2 * len(x)), tol=1e-8, max_iter=2000)
    model.fit(x.numpy(), y.numpy())
    theirs = {
        "weight": torch.tensor(model.coef_),
        "bias": torch.tensor(model.intercept_),
    }
    found = {
        "gradient": history[-1],
        "steps": len(history),
        "loss": loss(params, x, y).item(),
        "loss of scikit-learn": loss(theirs, x, y).item(),
    }
    print(found)
    return found


if __name__ == "__main__":
    main()

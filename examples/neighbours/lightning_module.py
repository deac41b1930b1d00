"""Lightning: a rule in a LightningModule; the Trainer does the rest.

The check runs in the first training step, and its report can be logged.
"""

import logging
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradtools as gt


@gt.custom_vjp
def softplus(x, beta):
    """Return ``log(1 + exp(beta * x)) / beta``."""
    return nn.functional.softplus(beta * x) / beta


@softplus.def_bwd
def _(residuals, g):
    ((x, beta), out) = residuals
    s = torch.sigmoid(beta * x)
    return g * s, (g * (x * s - out) / beta).sum()


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 32), nn.Linear(32, 1)
        self.beta = nn.Parameter(torch.tensor(1.0))
        self.losses = []

    def training_step(self, batch):
        x, y = batch
        out = self.last(gt.clip_grad(softplus(self.first(x), self.beta), -1, 1))
        loss = nn.functional.mse_loss(out.squeeze(1), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def main(folder, epochs=20):
    """Train on the CPU; return the module."""
    lightning.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x = torch.rand(256, 2) * 2 - 1
    data = DataLoader(TensorDataset(x, (3 * x[:, 0]).sin() * x[:, 1]), batch_size=64)
    module = Regression().to(x.dtype)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():  # Lightning's own, on how many workers load data
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    return module


if __name__ == "__main__":
    trained = main(".")
    print(f"loss {trained.losses[0]:.3f} -> {trained.losses[-1]:.4f}")
    print(softplus)

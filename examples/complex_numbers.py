"""Complex arguments: how much light a lens of phases sends to one place.

The convention is torch's: the cotangent of a complex argument is the conjugate
derivative, so that a step along minus the gradient descends. For a holomorphic f that
is ``g * f'(z).conj()``; |z|^2 is not holomorphic, and has ``2 g z``.
"""

import torch

import gradtools as gt


@gt.custom_vjp
def square(z):
    return z * z


@square.def_bwd
def _(residuals, g):
    (z,), _ = residuals
    return g * (2 * z).conj()


@gt.custom_vjp
def intensity(z):
    return z.real**2 + z.imag**2


@intensity.def_bwd
def _(residuals, g):
    (z,), _ = residuals
    return 2 * g * z


torch.manual_seed(0)
z = torch.randn(4, dtype=torch.complex64)
loss = lambda square, intensity: lambda z: intensity(square(z) + 1).sum()
mine = gt.grad(loss(square, intensity))(z)
theirs = gt.grad(loss(torch.square, lambda z: z.abs() ** 2))(z)
print(f"gradient off by {(mine - theirs).abs().max():.1e} from torch's")

# 64 emitters, whose phases are set so that their waves meet at one place
emitters = torch.linspace(-1, 1, 64)
paths = torch.sqrt((emitters - 0.3) ** 2 + 4)
waves = torch.exp(1j * 40 * paths) / paths
phases = torch.zeros(64, requires_grad=True)
optimizer = torch.optim.Adam([phases], lr=0.1)
light = lambda phases: intensity((waves * torch.exp(1j * phases)).sum())
before = light(phases).item()
for _ in range(200):
    optimizer.zero_grad()
    (-light(phases)).backward()
    optimizer.step()
best = (waves.abs().sum() ** 2).item()
after = light(phases).item()
print(f"intensity {before:.1f} before, {after:.1f} after, {best:.1f} at most")

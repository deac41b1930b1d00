"""The plots of the page: small, one idea each, lines named where they end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.first_check import BY_HAND
from tests.benchmarks.ledger import Curve, Run
from tests.benchmarks.rivals.contest import (
    COMBINED,
    COMPOSABLE,
    COMPOSITE,
    CUSTOM_OP,
    GENERATED,
    GRADTOOLS,
    OWN_VMAP,
    TRANSFORMS,
)

# Blue for ourselves everywhere; the others keep their colour from plot to plot.
COLOURS = {
    GRADTOOLS: "#0b62a4",
    COMPOSABLE: "#d1495b",
    CUSTOM_OP: "#8f5db7",
    COMPOSITE: "#7a7a7a",
    OWN_VMAP: "#3a9679",
}
OTHERS = ("#0b62a4", "#d1495b", "#8f5db7", "#3a9679", "#c98a1b")


class Picture(NamedTuple):
    """A plot that was drawn: its file and what it shows."""

    file: str
    caption: str


def draw(curves: Sequence[Curve], folder: Path, suffix: str = "") -> list[Picture]:
    """Draw what there are curves for.

    Args:
        curves: Of one device.
        folder: Where the pictures go.
        suffix: Behind the names of the files, for another device.

    Returns:
        The pictures, in the order of the page.
    """
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    by_plot: dict[str, list[Curve]] = {}
    for curve in curves:
        by_plot.setdefault(curve.plot, []).append(curve)
    pictures = []
    if "size" in by_plot:
        pictures.append(draw_size(by_plot["size"], folder, f"size{suffix}.png"))
    if all(work in by_plot for work in TRANSFORMS):
        pictures.append(draw_vmap(by_plot, folder, f"vmap{suffix}.png"))
    if "check" in by_plot:
        pictures.append(draw_check(by_plot["check"], folder, f"check{suffix}.png"))
    return pictures


def panels(count: int, width: float) -> Any:
    """Return a figure and its axes, without what nobody looks at."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, count, figsize=(width, 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.set_xscale("log")
    return figure, axes[0]


def save(figure: Any, path: Path) -> None:
    """Write a picture, the same bytes for the same figures."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_lines(axis: Any, curves: Sequence[Curve]) -> None:
    """Draw ratios to a reference, which is the line at 1."""
    axis.axhline(1, color="#222222", linewidth=1)
    for curve in curves:
        axis.plot(
            curve.x,
            curve.y,
            color=COLOURS[curve.label],
            linewidth=2.2 if curve.label == GRADTOOLS else 1.3,
            marker="o",
            markersize=3,
            label=curve.label,
        )


def draw_size(curves: Sequence[Curve], folder: Path, file: str) -> Picture:
    """Draw time against the size of the tensor."""
    figure, (axis,) = panels(1, 6)
    draw_lines(axis, curves)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("numbers in x", fontsize=9)
    axis.set_ylabel(f"time, {COMBINED} = 1", fontsize=9)
    axis.legend(fontsize=8, frameon=False, ncols=2)
    axis.set_title("Forward and backward of the swish", fontsize=10, loc="left")
    save(figure, folder / file)
    return Picture(
        file,
        "Time of forward and backward against the size of the tensor, as a multiple of "
        f"the hand-written `{COMBINED}`.",
    )


def draw_vmap(by_plot: dict[str, list[Curve]], folder: Path, file: str) -> Picture:
    """Draw time against the size of the batch."""
    figure, axes = panels(len(TRANSFORMS), 9)
    for axis, work in zip(axes, TRANSFORMS, strict=True):
        draw_lines(axis, by_plot[work])
        axis.set_title(work, fontsize=10, loc="left")
        axis.set_xlabel("samples in the batch", fontsize=9)
    highest = max(max(curve.y) for work in TRANSFORMS for curve in by_plot[work])
    axes[0].set_ylim(0, 1.05 * max(1, highest))
    axes[0].set_ylabel(f"time, {GENERATED} = 1", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, frameon=False, ncols=3, loc="outside lower center"
    )
    save(figure, folder / file)
    return Picture(
        file,
        "Time of the swish under transforms against the size of the batch, as a "
        f"multiple of `{GENERATED}`.",
    )


def draw_check(curves: Sequence[Curve], folder: Path, file: str) -> Picture:
    """Draw the time of a first call's check."""
    figure, (axis,) = panels(1, 7)
    axis.set_yscale("log")
    names = [curve.label for curve in curves if not curve.label.endswith(BY_HAND)]
    colours = dict(zip(names, OTHERS, strict=False))
    for curve in curves:
        name, by_hand, _ = curve.label.partition(f", {BY_HAND}")
        axis.plot(
            curve.x,
            curve.y,
            color=colours[name],
            linewidth=1 if by_hand else 1.8,
            linestyle=":" if by_hand else "-",
            label=None if by_hand else name,
        )
    axis.plot([], [], color="#222222", linestyle=":", linewidth=1, label=BY_HAND)
    axis.set_xlabel("numbers", fontsize=9)
    axis.set_ylabel("seconds", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    axis.set_title("The check of a first call", fontsize=10, loc="left")
    save(figure, folder / file)
    return Picture(
        file,
        "Time of the check of a first call, and dotted that of one fwd + bwd of the "
        "same operator.",
    )


def curves_of(runs: Sequence[Run]) -> list[Curve]:
    """Return the curves of each plot from the last run that has it."""
    last = {curve.plot: run for run in runs for curve in run.curves}
    return [
        curve
        for plot, run in last.items()
        for curve in run.curves
        if curve.plot == plot
    ]

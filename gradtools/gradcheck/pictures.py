"""Pictures of one cotangent beside its reference, as inline SVG.

What is drawn in INK and on PAPER takes the colours of the page, light or dark.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtools.gradcheck.report import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["pictures"]

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class _Errors:
    """How wrong a cotangent is, element by element.

    Attributes:
        relative: Distance from the reference, relative to its largest entry; NaN where
            either is not finite.
        worst: Where it is largest, or not finite; None where there is no error.
    """

    relative: Array
    worst: int | None

    @classmethod
    def of(cls, shown: Figures) -> _Errors:
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.abs(shown.analytic - shown.reference).reshape(-1)
        scale = _largest(shown.reference) or _largest(shown.analytic) or 1.0
        relative = np.where(np.isfinite(distance), distance / scale, np.nan)
        if not relative.any():  # NaN counts
            return cls(relative, None)
        return cls(relative, int(np.argmax(np.nan_to_num(relative, nan=np.inf))))

    @property
    def drawn(self) -> Array:
        """The errors on a logarithmic scale, where zero would have no place."""
        return np.clip(self.relative, FLOOR, None)

    def label(self, shown: Figures) -> str:
        """The worst element and its error, in words."""
        if self.worst is None:
            return "no error" if self.relative.size else "no elements"
        error = self.relative[self.worst]
        size = f"{error:.1e}" if np.isfinite(error) else "not finite"
        index = np.unravel_index(int(shown.places[self.worst]), shown.shape)
        inside = ", ".join(str(int(place)) for place in index)
        return f"worst {size} at [{inside}]" if inside else f"error {size}"


FLOOR = 1e-16  # errors below are drawn here


def _largest(values: Array) -> float:
    sizes = np.abs(values)
    return float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))


def pictures(shown: Figures, prefix: str) -> str:
    """Return the three pictures of one argument, as SVG in figures."""
    errors = _Errors.of(shown)
    panels = {
        f"bwd against {shown.source}": _against,
        "error of each element": _map if _is_whole(shown) else _stems,
        "error against step size": _steps,
    }
    rows = [
        f"<figure>{_drawn(draw, shown, errors, f'{prefix}-{place}', caption)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for place, (caption, draw) in enumerate(panels.items())
    ]
    shape = f"shape {shown.shape}"
    facts = f"{shape}, {errors.label(shown)}"
    title = f"<code>{escape(shown.where)}</code> <small>{facts}</small>"
    return f'<h3>{title}</h3><div class="row">{"".join(rows)}</div>'


def _is_whole(shown: Figures) -> bool:
    return shown.places.size == int(np.prod(shown.shape))


# What pictures are drawn with.

INK, PAPER = "#010203", "#fefdfc"  # replaced by the colours of the page
BLUE, ORANGE, RED, GREEN, GREY = "#3d8bd9", "#e08a2e", "#e5484d", "#2f9e77", "#8b929c"

Draw = Callable[["Axes", Figures, _Errors], None]


def _drawn(draw: Draw, shown: Figures, errors: _Errors, prefix: str, label: str) -> str:
    """Return a picture as SVG that can stand in a page beside others."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the pictures of a report need matplotlib: pip install 'gradtools[report]'"
        ) from error
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style.context(["default", _LOOK]):
        figure = Figure(figsize=(4.0, 3.1), layout="constrained")
        draw(figure.add_subplot(), shown, errors)
        figure.savefig(file, format="svg", transparent=True, dpi=200, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = text.replace(PAPER, "var(--paper)")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


_LOOK = {
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.handlelength": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "viridis",
    "svg.fonttype": "path",
}


def _say(axes: Axes, text: str) -> None:
    """Write a sentence in place of a picture."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def _in_powers(axis: Any) -> None:
    """Label a logarithmic axis in plain numbers, few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))


def _grid(axes: Axes) -> None:
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)


# The three pictures.


def _against(axes: Axes, shown: Figures, errors: _Errors) -> None:
    """What bwd returns against what it should be, with the line where they agree."""
    is_complex = np.iscomplexobj(shown.analytic) or np.iscomplexobj(shown.reference)
    parts = [("real part", np.real, BLUE), ("imaginary part", np.imag, ORANGE)]
    pairs = [
        (name, part(shown.reference).ravel(), part(shown.analytic).ravel(), colour)
        for name, part, colour in (parts if is_complex else parts[:1])
    ]
    low, high = _limits([values for _, *both, _ in pairs for values in both])
    axes.plot([low, high], [low, high], "--", color=GREY, lw=1, label="y = x")
    many = shown.places.size > 2000
    for name, x, y, colour in pairs:
        axes.plot(
            x,
            y,
            "o",
            color=colour,
            ms=3 if x.size > 50 else 5,
            alpha=0.65,
            mew=0,
            rasterized=many,
            label=name if is_complex else None,
        )
    if errors.worst is not None:
        worst = [(x[errors.worst], y[errors.worst]) for _, x, y, _ in pairs]
        _ring(axes, worst, errors.label(shown))
    axes.set(xlim=(low, high), ylim=(low, high), ylabel="what bwd returns")
    axes.set_xlabel(f"what it should be, by {shown.source}")
    axes.locator_params(nbins=5)
    axes.ticklabel_format(style="sci", scilimits=(-3, 4))
    _grid(axes)
    axes.legend(loc="best" if not many else "upper left")


def _limits(values: Sequence[Array]) -> tuple[float, float]:
    """Return what shows all finite values, with a margin."""
    together = np.concatenate([np.asarray(each, dtype=float) for each in values])
    finite = together[np.isfinite(together)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _ring(axes: Axes, points: Sequence[tuple[float, float]], label: str) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(
        x,
        y,
        "o",
        ms=10,
        mfc="none",
        mec=RED,
        mew=1.5,
        clip_on=False,
        label=label,
        ls="none",
    )


def _map(axes: Axes, shown: Figures, errors: _Errors) -> None:
    """The error of every element, in the shape of the argument."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    if not errors.relative.size:
        return _say(axes, "the argument has no elements")
    flat = np.empty(errors.relative.size)
    flat[shown.places] = errors.drawn
    rows, columns = _folded(shown.shape)
    colours = _colours()
    picture = axes.imshow(
        _pooled(flat.reshape(rows, columns)),
        norm=LogNorm(FLOOR, 1.0, clip=True),
        cmap=colours,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )
    if errors.worst is not None:
        row, column = divmod(int(shown.places[errors.worst]), columns)
        _ring(axes, [(column, row)], "")
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.set_xlabel("last dimension" if len(shown.shape) > 1 else "element")
    axes.set_ylabel(
        "all dimensions before" if len(shown.shape) > 2 else "first dimension"
    )
    if rows == 1:
        axes.set(yticks=[], ylabel="")
    if not np.isfinite(flat).all():
        axes.set_xlabel(f"{axes.get_xlabel()} (grey: not finite)")
    figure: Any = axes.figure
    bar = figure.colorbar(picture, ax=axes, label="relative to the largest entry")
    bar.solids.set_rasterized(True)
    _in_powers(bar.ax.yaxis)
    bar.outline.set_visible(False)
    return None


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad=GREY)


def _folded(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns in which an array of any shape is shown."""
    return int(np.prod(shape[:-1])), int(np.prod(shape[-1:]))


def _pooled(values: Array, most: int = 250) -> Array:
    """Keep the largest of each block of a picture with too many elements to see."""
    for axis, size in enumerate(values.shape):
        if size > most:
            edges = np.linspace(0, size, most, endpoint=False).astype(int)
            values = np.maximum.reduceat(values, edges, axis=axis)
    return values


def _stems(axes: Axes, shown: Figures, errors: _Errors) -> None:
    """The errors of a sample of the elements, over their positions."""
    if not errors.relative.size:
        return _say(axes, "the argument has no elements")
    top = np.nanmax(errors.drawn, initial=FLOOR)
    heights = np.nan_to_num(errors.drawn, nan=top)
    axes.vlines(shown.places, FLOOR, heights, color=BLUE, lw=0.8, alpha=0.5)
    axes.plot(shown.places, heights, "o", color=BLUE, ms=3, mew=0)
    bad = ~np.isfinite(errors.drawn)
    if bad.any():
        axes.plot(shown.places[bad], heights[bad], "x", color=RED, label="not finite")
    if errors.worst is not None:
        worst = shown.places[errors.worst], heights[errors.worst]
        _ring(axes, [worst], errors.label(shown))
        axes.legend(loc="upper left")
    top = max(top, 1e-13)
    room_for_legend = 10 * (top / FLOOR) ** 0.2
    axes.set(yscale="log", ylim=(FLOOR, top * room_for_legend))
    axes.set_xlabel(
        f"position: {shown.places.size} of {int(np.prod(shown.shape)):,} elements"
    )
    axes.set_ylabel("relative to the largest entry")
    _in_powers(axes.yaxis)
    axes.locator_params(axis="x", nbins=4)
    _grid(axes)
    return None


def _steps(axes: Axes, shown: Figures, errors: _Errors) -> None:
    """How far differences are from bwd, by step size: a V where bwd is right."""
    known = np.isfinite(shown.errors) & np.isfinite(shown.steps) & (shown.steps > 0)
    order = np.argsort(shown.steps[known])
    steps = shown.steps[known][order]
    distances = np.clip(shown.errors[known][order], FLOOR, None)
    if not steps.size:
        return _say(axes, "no step sizes were measured")
    axes.plot(steps, distances, "o-", color=BLUE, ms=4, lw=1.2, zorder=3)
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(min(distances.min() / 10, 1e-8), distances.max() * 100)
    for side in _sides(steps, distances):
        guide = side.level * steps**side.power
        axes.plot(steps, guide, "--", color=side.colour, lw=1, label=side.label)
        axes.axvspan(*side.reach, color=side.colour, alpha=0.1, lw=0)
    _mark_lowest(axes, steps, distances)
    axes.set_xlabel("step size, relative to the argument")
    axes.set_ylabel("differences against bwd, relative")
    _in_powers(axes.xaxis)
    _in_powers(axes.yaxis)
    _grid(axes)
    axes.legend(loc="best")
    return None


def _mark_lowest(axes: Axes, steps: Array, distances: Array) -> None:
    """Mark the bottom of the V, or the level at which there is none."""
    best = int(np.argmin(distances))
    lowest = distances[best]
    valley = steps[distances <= 3 * lowest]
    if lowest > 1e-6 and valley.max() > 100 * valley.min():
        axes.axhline(lowest, color=RED, lw=1, ls=":", label=f"stays at {lowest:.0e}")
    else:
        label = f"smallest, {lowest:.0e} at {steps[best]:.0e}"
        _ring(axes, [(steps[best], lowest)], label)


@dataclasses.dataclass(frozen=True)
class _Side:
    """The step sizes at which one of the two errors of differences dominates."""

    label: str
    colour: str
    power: int
    level: float
    reach: tuple[float, float]


def _sides(steps: Array, distances: Array) -> list[_Side]:
    """Return the sides of the V that are there."""
    best = int(np.argmin(distances))
    places = np.arange(steps.size)
    risen = distances > 3 * distances[best]
    sides = [
        _side("rounding, 1/h", GREEN, -1, steps, distances, risen & (places < best)),
        _side("truncation, h²", ORANGE, 2, steps, distances, risen & (places > best)),
    ]
    return [side for side in sides if side is not None]


def _side(
    label: str, colour: str, power: int, steps: Array, distances: Array, there: Array
) -> _Side | None:
    """Return a side if its errors go with that power of the step size, roughly."""
    if there.sum() < 3:
        return None
    x, y = np.log(steps[there]), np.log(distances[there])
    if abs(np.polyfit(x, y, 1)[0] - power) > 0.6:
        return None
    level = float(np.exp(np.median(y - power * x)))
    first, *_, last = steps[there]
    return _Side(label, colour, power, level, (float(first), float(last)))


# The page.

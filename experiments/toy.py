"""Optimizers side by side on functions of two variables, as in the AdaBelief paper (arXiv:2010.07468, Zhuang et al.).

One run trains a point for each function and optimizer, and ends with a picture of their trajectories.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from trainer.config import setting
from trainer.data import ArraySource
from trainer.errors import UserError
from trainer.experiment import Batch, Collections, RandomAccessSource, Variables
from trainer.metrics import Mean, Metrics
from trainer.report import ReportWriter

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:  # an error now, and not after the training
    raise UserError(
        f"experiments/toy.py needs Matplotlib for its picture: pip install -e '.[examples]' ({error})"
    ) from error


@dataclasses.dataclass(frozen=True)
class Function:
    """A function to minimise; its smallest value is 0.

    Attributes:
      formula: its title in the picture, in TeX.
      value: the function of x and y, which are numbers, JAX arrays or NumPy arrays.
      start: the point at which every optimizer starts.
      minimum: the point at which the function is 0.
      corner: the smallest x and y of the drawn area, which is 4 × 3 units large.
    """

    formula: str
    value: Callable[[Any, Any], Any]
    start: tuple[float, float]
    minimum: tuple[float, float]
    corner: tuple[float, float]


def _abs(x: Any, y: Any) -> Any:
    return abs(x) + abs(y)


def _valley(x: Any, y: Any) -> Any:
    return (x + y) ** 2 + (x - y) ** 2 / 10


def _beale(x: Any, y: Any) -> Any:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _rosenbrock(x: Any, y: Any) -> Any:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


FUNCTIONS = {
    # The start is near the x axis, so y soon changes its sign at every step while x moves on. The paper explains with
    # this case why AdaBelief's steps are long in x and short in y.
    "abs": Function("$|x| + |y|$", _abs, (-2.5, 0.25), (0.0, 0.0), (-3.0, -1.5)),
    # The curvature is 4 across the valley and 0.4 along it. The valley is diagonal, so no scaling of x and y makes the
    # curvatures equal. The paper's other valleys, such as |x|/10 + |y|, have a kink instead of a curvature.
    "valley": Function("Valley: $(x + y)^2 + (x - y)^2 / 10$", _valley, (2.5, 0.0), (0.0, 0.0), (-1.0, -2.0)),
    # The next two have their usual starting points (Moré, Garbow and Hillstrom, 1981).
    "rosenbrock": Function(
        "Rosenbrock: $(1 - x)^2 + 100 (y - x^2)^2$", _rosenbrock, (-1.2, 1.0), (1.0, 1.0), (-2.0, -1.0)
    ),
    "beale": Function("Beale", _beale, (1.0, 1.0), (3.0, 0.5), (0.0, -1.0)),
}


@dataclasses.dataclass(frozen=True)
class Style:
    """Title and line style of an optimizer's trajectories."""

    title: str
    colour: str
    marker: str
    width: float


# Colours that colour-blind readers can tell apart (Okabe and Ito). Each line is drawn over the one before and is
# thinner, so that all lines are visible where they coincide.
OPTIMIZERS = {
    "sgd": Style("SGD with momentum", "#0072B2", "s", 4.0),
    "adam": Style("Adam", "#E69F00", "^", 2.5),
    "adabelief": Style("AdaBelief", "#000000", "o", 1.2),
}


class Points(nn.Module):
    """A point for each optimizer, all with the same start."""

    start: tuple[float, float]

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, "2"]]:
        """The points by optimizer."""
        return {name: self.param(name, lambda _: jnp.asarray(self.start, jnp.float32)) for name in OPTIMIZERS}


class Race(nn.Module):
    """The points of every function."""

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Float[Array, "2"]]]:
        """The points by function and optimizer."""
        return {name: Points(function.start, name=name)() for name, function in FUNCTIONS.items()}


@dataclasses.dataclass
class Toy:
    """Minimises the sum of all functions at the points of all optimizers; each gradient is that of one function.

    The labels and groups of the config choose the optimizer of each parameter, such as `rosenbrock/adam`.
    """

    tolerance: float = setting(0.01, minimum=1e-6, may_change=True)
    """Distance from the minimum within which an optimizer has arrived; used in the picture only."""

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Every point at its start."""
        del batch
        return Race().init(key)

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metric "loss", the sum; while training also "beale/adam/x", "…/y", "…/value" and so on for every point."""
        del key
        points: Any = Race().apply(variables)
        values, positions = {}, {}
        for name, function in FUNCTIONS.items():
            for optimizer, (x, y) in points[name].items():
                path = f"{name}/{optimizer}"
                values[f"{path}/value"] = function.value(x, y)
                positions |= {f"{path}/x": x, f"{path}/y": y}
        metrics = {"loss": sum(values.values())} | (values | positions if train else {})
        mask = batch["mask"]
        return {name: Mean.of(jnp.broadcast_to(value, mask.shape), mask) for name, value in metrics.items()}, {}

    def source(self, split: str) -> RandomAccessSource:
        """One example, which the loss does not use."""
        del split
        return ArraySource({"nothing": np.zeros(1, np.float32)})

    def report(self, step: int, variables: Variables, writer: ReportWriter) -> None:
        """Draws the trajectories so far."""
        del step, variables
        writer.figure("trajectories", draw(writer.rows(), self.tolerance))


def trajectory(rows: Sequence[Mapping[str, Any]], function: str, optimizer: str) -> tuple[np.ndarray, np.ndarray]:
    """The first step and the steps in `rows` [T], and the points at which each of these steps began [T, 2]."""
    names = [f"train/{function}/{optimizer}/{axis}" for axis in "xy"]
    points = {1: FUNCTIONS[function].start}
    points |= {row["step"]: tuple(row[name] for name in names) for row in rows if names[0] in row}
    return np.array(list(points)), np.array(list(points.values()))


def distances(points: np.ndarray, function: str) -> np.ndarray:
    """Distances [T] of points [T, 2] from the minimum."""
    return np.linalg.norm(points - np.array(FUNCTIONS[function].minimum), axis=1)


def arrival(steps: np.ndarray, distances: np.ndarray, tolerance: float) -> int | None:
    """The first step from which on all distances are within the tolerance; None if the last distance is not."""
    (outside,) = np.nonzero(~(distances <= tolerance))
    first = outside[-1] + 1 if len(outside) else 0
    return int(steps[first]) if first < len(steps) else None


def draw(rows: Sequence[Mapping[str, Any]], tolerance: float) -> Figure:
    """A column for each function: its trajectories, and below them their distance from the minimum at each step."""
    figure = Figure(figsize=(17, 8), layout="constrained")
    figure.suptitle("From the circle to the star, with marks at the steps that are marked below", fontsize=14)
    axes = figure.subplots(2, len(FUNCTIONS))
    for (name, function), (plane, course) in zip(FUNCTIONS.items(), axes.T, strict=True):
        _draw_function(plane, function)
        _draw_trajectories(plane, course, rows, name, tolerance)
    axes[1, 0].set_ylabel("distance from the star")
    return figure


def _draw_function(plane: Axes, function: Function) -> None:
    left, bottom = function.corner
    x, y = np.meshgrid(np.linspace(left, left + 4, 401), np.linspace(bottom, bottom + 3, 301))
    height = np.log10(np.maximum(function.value(x, y), 1e-3))
    # Above the highest value, so that even the highest value is light grey.
    darkest = height.max() + 1.5 * (height.max() - height.min())
    plane.contourf(x, y, height, levels=16, cmap="Greys", vmax=darkest)
    plane.contour(x, y, height, levels=16, colors="white", linestyles="solid", linewidths=0.8)
    mark = {"color": "white", "markeredgecolor": "black", "zorder": 4}
    plane.plot(*function.start, "o", markersize=10, **mark)
    plane.plot(*function.minimum, "*", markersize=16, **mark)
    plane.set(xlim=(left, left + 4), ylim=(bottom, bottom + 3), aspect="equal", title=function.formula)


def _draw_trajectories(
    plane: Axes, course: Axes, rows: Sequence[Mapping[str, Any]], name: str, tolerance: float
) -> None:
    paths = {optimizer: trajectory(rows, name, optimizer) for optimizer in OPTIMIZERS}
    away = {optimizer: distances(points, name) for optimizer, (_, points) in paths.items()}
    arrivals = {optimizer: arrival(steps, away[optimizer], tolerance) for optimizer, (steps, _) in paths.items()}
    last = max(arrivals[optimizer] or int(steps[-1]) for optimizer, (steps, _) in paths.items())
    ticks = np.array(MaxNLocator(7, steps=(1, 2, 5, 10), integer=True).tick_values(0, last))
    ticks = ticks[ticks <= last]
    for optimizer, style in OPTIMIZERS.items():
        steps, points = paths[optimizer]
        arrived = arrivals[optimizer]
        look: dict[str, Any] = {"color": style.colour, "marker": style.marker, "linewidth": style.width}
        look["markevery"] = np.searchsorted(steps, ticks[1:]).tolist()
        plane.plot(*points.T, **look)
        course.plot(steps, away[optimizer], **look, label=f"{style.title}: {f'{arrived:,}' if arrived else 'not yet'}")
    course.axhline(tolerance, color="black", linestyle=":")
    # The two decades above the data hold the legend.
    course.set(xlim=(0, 1.04 * last), ylim=(tolerance / 10, 200), yscale="log", xticks=ticks, xlabel="step")
    course.grid(alpha=0.3)
    course.legend(title=f"within {tolerance:g} of the star from step", loc="upper right")

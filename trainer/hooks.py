"""Hooks: objects whose methods `train` calls while it runs, for early stopping, plots and work of the user's own.

    train(run, "runs/digits", hooks=[EarlyStopping("test/loss", patience=3)])

A hook has any of the methods of `Hook`, and gets an `Event`.
"""

import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from trainer import distributed
from trainer.config import evaluation_of
from trainer.errors import UserError, did_you_mean
from trainer.metrics import numbers
from trainer.observe.log import MetricsLog, NoLog
from trainer.state import TrainState

HOOK_METHODS = ("on_start", "on_step", "on_log", "on_evaluate", "on_save", "on_end")


class Event(NamedTuple):
    """The argument of a hook. Every process calls its hooks at the same steps, with the same numbers."""

    step: int  # steps made; in `on_log` the step of the row, which is written late: later steps may be running
    # In `on_step` the metrics of the step, as objects whose arrays may still be computed; in other methods numbers by
    # name. Read `metrics` instead.
    raw_metrics: Mapping[str, Any]
    newest: Callable[[], TrainState]
    log: MetricsLog | NoLog
    hooks: "Hooks"

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers by name, such as "train/loss" or "test/accuracy". In `on_step`, reading them waits for the step."""
        values = self.raw_metrics
        return values if all(isinstance(x, float | int) for x in values.values()) else numbers(values, "train")

    @property
    def state(self) -> TrainState:
        """The newest state, whose `step` may be later than that of a row. The next step overwrites its arrays."""
        return self.newest()

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric in each row of `metrics.jsonl` that has it. All processes call it together."""
        rows = self.log.rows() if isinstance(self.log, MetricsLog) else []
        own = [(row["step"], row[metric]) for row in rows if metric in row]
        gathered = json.loads(distributed.gather("history", json.dumps(own))[0])
        return [(step, math.nan if value is None else value) for step, value in gathered]

    def stop(self, reason: str) -> None:
        """Makes the newest step the last one: it is evaluated and saved. Every process must call it at the same step.

        The run then counts as ended by `reason`, a text that is shown. Another launch goes on, if no hook stops it.
        """
        self.hooks.reason = self.hooks.reason or reason


class Hook:
    """The moments at which a hook is called; a hook needs neither this class nor all of its methods.

    An exception ends the run in good order: the newest state is saved, and the exception is raised. With several
    processes the last checkpoint stays as it is.
    """

    def on_start(self, event: Event) -> None:
        """Before the first step of this launch; `event.step` is 0 for a new run, and `metrics` is empty."""

    def on_step(self, event: Event) -> None:
        """After each step was dispatched; it costs nothing unless the hook reads metrics or state."""

    def on_log(self, event: Event) -> None:
        """After each row of training metrics was written."""

    def on_evaluate(self, event: Event) -> None:
        """After each evaluation."""

    def on_save(self, event: Event) -> None:
        """After each checkpoint was begun; it may not be on disk yet. `metrics` is empty."""

    def on_end(self, event: Event) -> None:
        """After the last state was saved, also if a signal or a hook stopped the run. `metrics` is empty."""


class Hooks:
    """The hooks of a run, by moment. Without hooks a call does nothing."""

    def __init__(self, hooks: Iterable[object] = (), evaluations: Iterable[str] = ()) -> None:
        """Hooks of a run with these evaluations.

        Raises `UserError` if `hooks` is no iterable, and for a hook that is a class, that has a method `on_…` which is
        not in `HOOK_METHODS`, or that has none of them.
        """
        if not isinstance(hooks, Iterable):
            raise UserError(f"hooks is a {type(hooks).__name__}; a list of hooks is expected")
        hooks = list(hooks)
        self.evaluations = tuple(evaluations)
        self._calls = {name: [call for hook in hooks if (call := getattr(hook, name, None))] for name in HOOK_METHODS}
        self.reason = ""  # why a hook stopped the run
        self.failed = False  # whether a hook raised an exception; then none is called any more
        for hook in hooks:
            kind = hook.__name__ if isinstance(hook, type) else type(hook).__name__
            if isinstance(hook, type):
                raise UserError(f"hook {kind} is a class; pass an instance: {kind}()")
            own = [name for name in dir(hook) if name.startswith("on_")]
            if wrong := next((name for name in own if name not in HOOK_METHODS), None):
                nearest = did_you_mean(wrong, HOOK_METHODS)
                raise UserError(f"hook {kind} has a method {wrong}, which nothing calls{nearest}")
            if not own:
                raise UserError(f"hook {kind} has none of the methods {', '.join(HOOK_METHODS)}")

    def call(
        self,
        name: str,
        step: int,
        raw_metrics: Mapping[str, Any],
        newest: Callable[[], TrainState],
        log: MetricsLog | NoLog,
    ) -> None:
        """Calls each hook that has the method `name`; arguments are those of `Event`."""
        for call in () if self.failed else self._calls[name]:
            try:
                call(Event(step, raw_metrics, newest, log, self))
            except BaseException:
                self.failed = True
                raise


class EarlyStopping(Hook):
    """Stops a run whose metric did not improve in the last `patience` evaluations.

    It decides from all values so far, those of earlier launches included, so a resumed run stops at the same step.
    """

    def __init__(self, metric: str, *, patience: int, mode: str = "min", min_delta: float = 0.0) -> None:
        """Improvement means more than `min_delta` below the best value before; with `mode="max"` above it.

        NaN is no improvement. Raises `UserError` for a patience below 1, a negative `min_delta` or another mode.
        """
        if patience < 1:
            raise UserError(f"patience is {patience}; it must be at least 1")
        if not min_delta >= 0:
            raise UserError(f"min_delta is {min_delta}; it must be at least 0")
        if mode not in ("min", "max"):
            raise UserError(f"mode is {mode!r}{did_you_mean(mode, ('min', 'max'))}")
        self.metric, self.patience, self._min_delta = metric, patience, min_delta
        self._sign = 1 if mode == "min" else -1
        self._best, self._since = math.inf, 0

    def on_start(self, event: Event) -> None:
        """Takes up the evaluations of earlier launches; raises `UserError` if the run has no such evaluation."""
        if self._evaluation(event) is None:
            name = self.metric.partition("/")[0]
            unknown = f"names the evaluation {name!r}, which the run does not have"
            raise UserError(f"metric {self.metric!r} {unknown}{did_you_mean(name, event.hooks.evaluations)}")
        self._best, self._since = math.inf, 0
        for step, value in event.history(self.metric):
            self._add(event, step, value)

    def on_evaluate(self, event: Event) -> None:
        """Stops the run if it is time; raises `UserError` if the metric is not evaluated."""
        if not any(name.startswith(f"{self._evaluation(event)}/") for name in event.metrics):
            return  # another evaluation
        if self.metric not in event.metrics:
            raise UserError(f"metric {self.metric!r} is not evaluated{did_you_mean(self.metric, event.metrics)}")
        self._add(event, event.step, event.metrics[self.metric])

    def _evaluation(self, event: Event) -> str | None:
        """The name of the evaluation that the metric is of, which may hold slashes; None if the run has none."""
        return evaluation_of(self.metric, event.hooks.evaluations)

    def _add(self, event: Event, step: int, value: float) -> None:
        if self._sign * value < self._best - self._min_delta:
            self._best, self._since = self._sign * value, 0
        else:
            self._since += 1
        if self._since >= self.patience:
            best = self._sign * self._best
            event.stop(f"{self.metric} did not improve on {best:.6g} in {self.patience} evaluations, up to step {step}")


class Plot(Hook):
    """Draws the curves of metrics below the cell of a notebook, and updates the drawing in place. Needs matplotlib."""

    def __init__(self, *metrics: str, log_scale: bool = False) -> None:
        """Curves of the metrics named, such as "train/loss" and "test/loss"; by default of "train/loss".

        `log_scale`: whether the y axis is logarithmic. Raises `UserError` if matplotlib or IPython is not installed.
        """
        for package in ("matplotlib", "IPython"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"Plot needs {package}: pip install {package.lower()}")
        self.metrics, self._log_scale = metrics or ("train/loss",), log_scale
        self._values: dict[str, list[tuple[int, float]]] = {}
        self._display: Any = None

    def on_start(self, event: Event) -> None:
        """Begins a drawing with the values of earlier launches."""
        self._values = {name: event.history(name) for name in self.metrics}
        self._display = None

    def on_log(self, event: Event) -> None:
        """Adds the values of a row."""
        self._add(event.step, event.metrics)

    def on_evaluate(self, event: Event) -> None:
        """Adds the values of an evaluation."""
        self._add(event.step, event.metrics)

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        added = [self._values[name].append((step, metrics[name])) for name in self.metrics if name in metrics]
        if not added or not distributed.is_primary():
            return
        from IPython.display import Image, display

        # As an image: a notebook draws a figure only if matplotlib's inline backend was loaded.
        file = io.BytesIO()
        self.figure().savefig(file, format="png")
        image = Image(file.getvalue())
        if self._display is None:
            self._display = display(image, display_id=True)
        else:
            self._display.update(image)

    def figure(self) -> Any:
        """The curves so far, as a `matplotlib.figure.Figure`."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        for name, values in self._values.items():
            steps, numbers = zip(*values, strict=True) if values else ((), ())
            axes.plot(steps, numbers, label=name, marker="." if len(values) < 20 else None)
        axes.set_xlabel("step")
        if self._log_scale:
            axes.set_yscale("log")
        axes.legend()
        return figure

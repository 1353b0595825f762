"""The toy functions, the order in which the optimizers arrive, and the picture."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.toy import FUNCTIONS, OPTIMIZERS, Toy, arrival, distances, draw, trajectory
from trainer import train
from trainer.commands import run as run_command
from trainer.commands.arguments import load_config
from trainer.observe.log import read_rows

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/toy.py"

each_function = pytest.mark.parametrize("name", FUNCTIONS)

# For each distance from the minimum, the step from which on an optimizer stays within that distance.
ARRIVALS = {
    0.01: {
        "abs": {"sgd": 2500, "adam": 2491, "adabelief": 392},
        "valley": {"sgd": 12897, "adam": 7158, "adabelief": 2542},
        "rosenbrock": {"sgd": 11251, "adam": 10705, "adabelief": 7669},
        "beale": {"sgd": 11941, "adam": 7127, "adabelief": 2041},
    },
    0.1: {
        "abs": {"sgd": 2410, "adam": 2401, "adabelief": 367},
        "valley": {"sgd": 7163, "adam": 6051, "adabelief": 1901},
        "rosenbrock": {"sgd": 5628, "adam": 9437, "adabelief": 6491},
        "beale": {"sgd": 4771, "adam": 5365, "adabelief": 1061},
    },
}


def slope(name: str, point: np.ndarray) -> np.ndarray:
    """The gradient of a function by central differences in float64."""
    value, (x, y), h = FUNCTIONS[name].value, point, 1e-6
    return np.array([value(x + h, y) - value(x - h, y), value(x, y + h) - value(x, y - h)]) / (2 * h)


def written_out(name: str, steps: int) -> dict[str, np.ndarray]:
    """The point at which each step begins [steps, 2], by the papers' algorithms in float64."""
    trajectories = {}
    for optimizer in OPTIMIZERS:
        point, m, s = np.array(FUNCTIONS[name].start), np.zeros(2), np.zeros(2)
        trajectories[optimizer] = np.empty((steps, 2))
        for t in range(1, steps + 1):
            trajectories[optimizer][t - 1] = point
            g = slope(name, point)
            m = 0.9 * m + 0.1 * g
            if optimizer == "sgd":
                point = point - 1e-3 * m
                continue
            s = 0.999 * s + 0.001 * (g if optimizer == "adam" else g - m) ** 2
            point = point - 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
    return trajectories


def batch(mask: list[float]) -> dict[str, Any]:
    return {"nothing": jnp.zeros(len(mask)), "mask": jnp.array(mask)}


def loss(variables: Any, mask: list[float], *, training: bool = True) -> Any:
    return Toy().loss(variables, batch(mask), key=jax.random.key(0), train=training)[0]


@pytest.fixture(scope="module")
def start() -> Any:
    return Toy().init(jax.random.key(0), batch([1.0]))


@pytest.fixture(scope="module")
def scattered(start: Any) -> Any:
    """The variables with a random position for every point."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(-2, 2, x.shape), x.dtype), start)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    return list(read_rows(workdir / "metrics.jsonl"))


def arrivals(rows: list[dict[str, Any]], name: str, tolerance: float) -> dict[str, int | None]:
    paths = {optimizer: trajectory(rows, name, optimizer) for optimizer in OPTIMIZERS}
    return {o: arrival(steps, distances(points, name), tolerance) for o, (steps, points) in paths.items()}


def short_run(steps: int) -> Any:
    run = load_config("configs/toy.py")
    run.total_steps = steps
    return run


@pytest.mark.parametrize(
    ("name", "x", "y", "value"),
    [
        ("abs", -2.5, 0.25, 2.75),
        ("valley", 2.5, 0.0, 6.875),
        ("valley", 1.0, -1.0, 0.4),
        ("rosenbrock", -1.2, 1.0, 24.2),
        ("rosenbrock", 0.0, 0.0, 1.0),
        ("beale", 1.0, 1.0, 14.203125),
        ("beale", 0.0, 0.0, 14.203125),
    ],
)
def test_function_has_its_known_values(name, x, y, value):
    assert FUNCTIONS[name].value(x, y) == pytest.approx(value, rel=1e-14)


@each_function
def test_function_is_zero_at_its_minimum_and_positive_around_it(name):
    function = FUNCTIONS[name]
    x, y = function.minimum
    assert function.value(x, y) == 0
    angles = np.linspace(0, 2 * np.pi, 100)
    assert function.value(x + 0.1 * np.cos(angles), y + 0.1 * np.sin(angles)).min() > 0


@each_function
def test_what_is_drawn_of_a_function_holds_start_and_minimum(name):
    function = FUNCTIONS[name]
    for place in (function.start, function.minimum):
        inside = np.array(place) - function.corner
        assert (inside > 0).all()
        assert (inside < (4, 3)).all()


def test_every_optimizer_begins_at_the_start_of_the_function(start):
    actual = {
        name: {o: tuple(point.tolist()) for o, point in points.items()} for name, points in start["params"].items()
    }
    assert actual == {
        name: dict.fromkeys(OPTIMIZERS, pytest.approx(function.start)) for name, function in FUNCTIONS.items()
    }


@each_function
def test_gradient_of_each_point_is_that_of_its_function_alone(name, scattered):
    gradient = jax.grad(lambda variables: loss(variables, [1.0])["loss"].total)(scattered)
    for optimizer in OPTIMIZERS:
        point = np.asarray(scattered["params"][name][optimizer], np.float64)
        np.testing.assert_allclose(gradient["params"][name][optimizer], slope(name, point), rtol=1e-4)


def test_loss_is_the_sum_of_all_values(scattered):
    metrics = loss(scattered, [1.0])
    values = [float(mean.total) for name, mean in metrics.items() if name.endswith("/value")]
    assert len(values) == len(FUNCTIONS) * len(OPTIMIZERS)
    assert float(metrics["loss"].total) == pytest.approx(sum(values))


def test_metrics_of_a_step_are_the_points_that_it_began_with_and_their_values(scattered):
    metrics = loss(scattered, [1.0])
    for name, function in FUNCTIONS.items():
        for optimizer in OPTIMIZERS:
            x, y = scattered["params"][name][optimizer]
            assert metrics[f"{name}/{optimizer}/x"] == (x, 1)
            assert metrics[f"{name}/{optimizer}/y"] == (y, 1)
            assert float(metrics[f"{name}/{optimizer}/value"].total) == pytest.approx(float(function.value(x, y)))


def test_evaluation_gives_the_loss_alone(scattered):
    assert set(loss(scattered, [1.0], training=False)) == {"loss"}


@pytest.mark.parametrize("mask", [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
def test_metrics_do_not_depend_on_how_many_rows_there_are(mask, scattered):
    one = loss(scattered, [1.0])
    for name, mean in loss(scattered, mask).items():
        assert float(mean.weight) == sum(mask)
        assert mean.total / mean.weight == one[name].total


@pytest.mark.parametrize(
    ("away", "expected"),
    [
        ([3.0, 2.0, 1.0, 0.5], 30),
        ([3.0, 1.0, 2.0, 1.0], 40),
        ([1.0, 1.0, 1.0, 1.0], 10),
        ([3.0, 1.0, 1.0, 2.0], None),
        ([3.0, 1.0, np.nan, 1.0], 40),
        ([3.0, 1.0, 1.0, np.nan], None),
    ],
)
def test_arrival_is_the_step_from_which_on_it_stays_within_the_tolerance(away, expected):
    assert arrival(np.array([10, 20, 30, 40]), np.array(away), 1.0) == expected


def test_trajectory_begins_at_the_start_and_passes_over_rows_of_evaluations():
    rows = [
        {"step": 10, "train/beale/adam/x": 2.0, "train/beale/adam/y": 0.75},
        {"step": 15, "test/loss": 1.0},
        {"step": 20, "train/beale/adam/x": 3.0, "train/beale/adam/y": 0.5, "test/loss": 1.0},
    ]
    steps, points = trajectory(rows, "beale", "adam")
    np.testing.assert_array_equal(steps, [1, 10, 20])
    np.testing.assert_array_equal(points, [[1, 1], [2, 0.75], [3, 0.5]])


def made_up_rows() -> list[dict[str, Any]]:
    """Straight lines to each minimum: AdaBelief arrives at step 50 and Adam at step 100; SGD covers a tenth."""
    rows = []
    for step in range(10, 101, 10):
        row: dict[str, Any] = {"step": step}
        for name, function in FUNCTIONS.items():
            for optimizer, share in {"sgd": step / 1000, "adam": step / 100, "adabelief": min(step / 50, 1)}.items():
                place = (1 - share) * np.array(function.start) + share * np.array(function.minimum)
                row |= {f"train/{name}/{optimizer}/{axis}": value for axis, value in zip("xy", place, strict=True)}
        rows.append(row)
    return rows


def test_picture_says_for_each_function_from_which_step_an_optimizer_is_there():
    axes = draw(made_up_rows(), 0.01).axes
    legends = [legend for legend in (ax.get_legend() for ax in axes) if legend is not None]
    assert len(legends) == len(FUNCTIONS)
    for legend in legends:
        assert legend.get_title().get_text() == "within 0.01 of the star from step"
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts == ["SGD with momentum: not yet", "Adam: 100", "AdaBelief: 50"]


def test_picture_shows_every_trajectory_from_its_start():
    planes = draw(made_up_rows(), 0.01).axes[: len(FUNCTIONS)]
    for ax, (name, function) in zip(planes, FUNCTIONS.items(), strict=True):
        drawn = [np.array(line.get_data()).T for line in ax.get_lines() if len(np.atleast_1d(line.get_xdata())) > 1]
        for optimizer, points in zip(OPTIMIZERS, drawn, strict=True):
            np.testing.assert_array_equal(points, trajectory(made_up_rows(), name, optimizer)[1])
            assert tuple(points[0]) == function.start


@pytest.mark.parametrize(("optimizer", "expected"), [("adabelief", 400), ("adam", None)])
def test_what_arrives_first_is_adabelief_and_not_its_name(optimizer, expected, tmp_path):
    run = short_run(600)
    run.optimizer.groups["adabelief"].optimizer = optimizer
    train(run, tmp_path / "run")
    actual = arrivals(rows_of(tmp_path / "run"), "abs", 0.01)
    assert actual == {"sgd": None, "adam": None, "adabelief": expected}


@pytest.mark.slow
def test_command_draws_a_picture_at_its_evaluation_and_one_that_is_owed(capsys, tmp_path):
    workdir, pictures = tmp_path / "run", []
    command = ["train", CONFIG, "--config.total_steps=20", f"--workdir={workdir}"]
    picture = workdir / "reports" / "20" / "trajectories.png"
    for _ in range(2):
        assert run_command(command) == 0
        assert "\nstep 20: reports/20 has trajectories.png\n" in capsys.readouterr().out
        pictures.append(picture.read_bytes())
        picture.unlink()
        rows = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [row for row in rows if "test/loss" not in row]  # as if a kill had prevented the evaluation
        (workdir / "metrics.jsonl").write_text("".join(kept))
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1]


def test_missing_matplotlib_is_one_line_before_anything_is_trained(capsys, monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "experiments.toy")
    assert run_command(["train", CONFIG, f"--workdir={tmp_path}/run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "error: experiments/toy.py needs Matplotlib for its picture: pip install -e '.[examples]' ("
    )
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of the config's complete run, by the real command."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    command = [sys.executable, "-m", "trainer", "train", CONFIG, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (workdir / "reports" / "14000" / "trajectories.png").stat().st_size > 50_000
    return workdir


@pytest.mark.exhaustive
@each_function
def test_optimizers_arrive_when_the_papers_algorithms_do_in_float64(name, finished):
    points = written_out(name, 14_000)
    for tolerance, expected in ARRIVALS.items():
        steps = np.arange(1, 14_001)
        reference = {o: arrival(steps, distances(points[o], name), tolerance) for o in OPTIMIZERS}
        assert reference == pytest.approx(expected[name], abs=3)
        # Logged every ten steps, and in float32.
        assert arrivals(rows_of(finished), name, tolerance) == pytest.approx(expected[name], rel=2e-3, abs=12)


@pytest.mark.exhaustive
@each_function
def test_adabelief_is_the_first_within_a_hundredth(name, finished):
    actual: Any = arrivals(rows_of(finished), name, 0.01)
    assert actual["adabelief"] < 0.75 * min(actual["sgd"], actual["adam"])


@pytest.mark.exhaustive
@each_function
def test_adabelief_is_before_adam_within_a_tenth_too(name, finished):
    actual: Any = arrivals(rows_of(finished), name, 0.1)
    assert actual["adabelief"] < 0.75 * actual["adam"]


@pytest.mark.exhaustive
def test_sgd_is_the_first_within_a_tenth_on_rosenbrock(finished):
    actual: Any = arrivals(rows_of(finished), "rosenbrock", 0.1)
    assert actual["sgd"] < 0.9 * actual["adabelief"]

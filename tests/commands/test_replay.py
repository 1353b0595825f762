"""The folder of a diverged step, and `replay`, which names where its numbers stop being finite."""

import dataclasses
import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import config
from trainer.commands import run as run_command
from trainer.config import Group, Optimizer, Parallel, Run
from trainer.data import ArraySource
from trainer.data.order import Order
from trainer.divergence import explain, read, read_state
from trainer.errors import DivergedError, UserError
from trainer.metrics import Mean
from trainer.observe.progress import Progress
from trainer.opening import open_session
from trainer.program import build_program
from trainer.replay import replay

EXAMPLES, BATCH, STEP = 40, 8, 3
ORDER = Order(EXAMPLES, 0)(np.arange(EXAMPLES))
BAD = int(ORDER[(STEP - 1) * BATCH + 5])  # an example of the third batch


class Planted(nn.Module):
    """Two layers; the one named `squares` may give exactly 0, of which a logarithm is taken."""

    fault: str
    dtype: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="first", dtype=self.dtype)(x))
        if self.fault == "overflow":  # 200³ fits into float32, and not into float16
            x = Cube(name="cube")(x)
        if self.fault == "frozen":
            x = x + Root(name="root")()
        y = nn.Dense(1, name="squares", dtype=self.dtype, kernel_init=nn.initializers.ones)(x)
        if self.fault == "backward":
            y = jnp.sqrt(y**2)
        return Logarithm(name="log")(y) if self.fault == "log" else y


class Cube(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x**3


class Logarithm(nn.Module):
    @nn.compact
    def __call__(self, y):
        return jnp.log(jnp.abs(y))


class Root(nn.Module):
    """A root of 0, whose derivative is not finite."""

    @nn.compact
    def __call__(self):
        return jnp.sqrt(self.param("zero", nn.initializers.zeros, ()) ** 2)


class Twice(nn.Module):
    """Calls a module, another one, the first again, and a last one."""

    @nn.compact
    def __call__(self, x):
        again = nn.Dense(6, name="again")
        x = again(nn.Dense(6, name="between")(again(x)))
        return jnp.log(jnp.abs(nn.Dense(1, name="last")(x)))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="squares", kernel_init=nn.initializers.ones)(x)


@dataclasses.dataclass
class Task:
    """Examples of which one meets the planted fault."""

    fault: str = "log"
    dtype: str = "float32"

    def _model(self):
        models = {"loss": Plain(), "twice": Twice()}
        return models.get(self.fault) or Planted(self.fault, self.dtype)

    def init(self, key, batch):
        return self._model().init(key, batch["x"])

    def loss(self, variables, batch, *, key, train):
        out: Any = self._model().apply(variables, batch["x"])
        value = out[:, 0].astype(jnp.float32)
        value = jnp.log(jnp.abs(value)) if self.fault == "loss" else value**2
        return {"loss": Mean.of(value, batch["mask"])}, {}

    def source(self, split):
        x = np.random.default_rng(0).uniform(0.5, 1, (EXAMPLES, 6)).astype(np.float32)
        x[BAD] = {"overflow": 300.0, "data": np.nan}.get(self.fault, 0.0)
        return ArraySource({"x": x})


def planted(fault: str, dtype: str = "float32", steps: int = STEP, strategy: str = "data") -> Run:
    # Biases stay 0 under SGD with learning rate 0, so that `squares` gives log(0) at the planted example.
    optimizer = Optimizer(name="sgd", schedule=config.Schedule(peak=0.0), groups={"default": Group()})
    if fault == "frozen":
        optimizer.labels = (("root/.*", "frozen"), *optimizer.labels)
        optimizer.groups["frozen"] = Group(frozen=True)
    task = Task(fault, dtype)
    return config.resolve(
        Run(task, total_steps=steps, batch_size=BATCH, optimizer=optimizer, parallel=Parallel(strategy, devices=1))
    )


def kept(run: Run, workdir: Path, step: int = STEP) -> tuple[str, Path]:
    """The error and the folder about a step, which a session writes."""
    with open_session(build_program(run), workdir, Progress(run.total_steps, StringIO())) as session:
        text = str(explain(session, DivergedError("the loss is inf", step, can_be_skipped=True)))
    return text, workdir / "diverged" / str(step)


def test_a_logarithm_of_zero_is_named_by_module_and_parameter(tmp_path, capsys):
    text, folder = kept(planted("log"), tmp_path)
    known = "the loss is inf; the run is stopped, there is no checkpoint yet; recomputed, the loss is inf again; "
    drop = "--config.numerics.on_nonfinite=skip would drop such updates"
    assert text == f"{known}python -m trainer replay {folder} looks for the cause; {drop}"
    told = read(folder)
    assert (told.step, told.seed, told.reason, told.has_state) == (STEP, 0, "the loss is inf", True)
    assert told.positions == [16, 24]
    assert told.ids == ORDER[16:24].tolist()
    assert told.versions["jax"] == jax.__version__
    assert len(told.key) == 2
    assert json.loads((folder / "step.json").read_text())["config"]["batch_size"] == BATCH
    state = read_state(folder, told, build_program(planted("log")).state)
    assert int(state.step) == STEP - 1
    assert run_command(["replay", str(folder)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "first module Planted/log" in shown
    assert "first gradient squares/" in shown
    assert f"examples by their own loss 1: {BAD}" in shown


def test_a_fault_in_the_loss_itself_is_told_from_one_in_a_module(tmp_path):
    _, folder = kept(planted("loss"), tmp_path)
    result = replay(folder)
    assert "the output of every Linen module is finite: the cause is in the loss" in result.text
    assert "first module" not in result.text


def test_a_fault_in_a_backward_pass_is_told_from_one_in_the_loss(tmp_path):
    text, folder = kept(planted("backward"), tmp_path)
    assert "recomputed, the grad_norm is nan again" in text
    result = replay(folder)
    assert not result.is_finite
    assert "the loss and the output of every Linen module are finite: the cause is in a backward pass" in result.text
    assert "in the loss of the experiment" not in result.text


def test_a_gradient_that_a_frozen_parameter_would_have_is_not_reported(tmp_path):
    text, folder = kept(planted("frozen"), tmp_path)
    assert "recomputed, it is finite" in text
    result = replay(folder)
    assert result.is_finite, result.text
    assert "gradient" not in result.text


def test_the_first_gradient_is_that_of_the_module_called_last(tmp_path):
    _, folder = kept(planted("twice"), tmp_path)
    assert "first gradient last/" in " ".join(replay(folder).text.split())


def test_one_replica_of_pmap_draws_other_dropout_masks_than_the_replay(tmp_path):
    _, folder = kept(planted("log", strategy="pmap"), tmp_path)
    assert "under pmap each replica draws dropout masks of its own" in replay(folder).text


def test_a_workdir_in_place_of_the_folder_lists_its_steps(tmp_path, capsys):
    _, folder = kept(planted("data"), tmp_path)
    assert run_command(["replay", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"; here are {folder}\n")


def test_the_compilation_cache_is_that_of_the_flag(tmp_path, capsys):
    _, folder = kept(planted("data"), tmp_path)
    (tmp_path / "file").touch()
    assert run_command(["replay", str(folder), f"--compilation-cache={tmp_path / 'file'}"]) == 2
    expected = f"error: --compilation-cache={tmp_path / 'file'} cannot be made a folder: File exists\n"
    assert capsys.readouterr().err == expected


def test_nan_in_the_data_is_named_with_its_example(tmp_path):
    _, folder = kept(planted("data"), tmp_path)
    result = replay(folder)
    shown = " ".join(result.text.split())
    assert not result.is_finite
    assert f"input x of the examples {BAD}" in shown
    assert "first module Planted/first" in shown


def test_an_overflow_of_16_bits_is_told_from_a_fault_in_the_numbers(tmp_path):
    text, folder = kept(planted("overflow", "float16"), tmp_path)
    assert "again" in text
    result = replay(folder)
    shown = " ".join(result.text.split())
    assert result.is_finite
    assert "in float32 all is finite" in shown
    assert "first module (own dtype) Planted/cube" in shown
    assert "overflows in the 16-bit dtype" in shown


def test_a_step_that_is_finite_when_computed_again_points_at_the_hardware(tmp_path):
    text, folder = kept(planted("log"), tmp_path, step=2)
    assert "; recomputed, it is finite: suspect the hardware or nondeterminism; " in text
    result = replay(folder)
    assert result.is_finite
    assert "on the CPU all is finite" in result.text


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"step": 1}'])
def test_any_other_folder_is_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "step.json").write_text(content)
    assert run_command(["replay", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=r"step\.json"):
        read(tmp_path)


@pytest.mark.slow
def test_help_and_a_missing_folder(tmp_path):
    for arguments, code in (["--help"], 0), ([], 2), ([str(tmp_path / "none")], 2):
        command = [sys.executable, "-m", "trainer", "replay", *arguments]
        assert subprocess.run(command, capture_output=True, check=False).returncode == code

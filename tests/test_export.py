"""A file that `export` writes is read in a process that does not know this package, and gives the same numbers."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import xla_flags
from tests.tasks import make_run
from tests.test_restore import WRONG_RESULTS, Predicting, Returning, plain, set_kind
from trainer import config, load, train
from trainer.commands import run as command
from trainer.data import take

ARRAYS = """
import sys
import numpy as np
from safetensors import safe_open

with safe_open(sys.argv[1], "np") as file:
    np.savez(sys.argv[2], **{name: file.get_tensor(name) for name in file.keys()})
    print(sorted(file.metadata().items()))
assert "trainer" not in sys.modules
"""
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from jax import export

model = export.deserialize(bytearray(Path(sys.argv[1]).read_bytes()))
batch = dict(np.load(sys.argv[2]))
found = model.call(batch)
np.savez(sys.argv[3], **{name: np.float64(x) for name, x in found.items()})
print(model.platforms)
assert "trainer" not in sys.modules and "flax" not in sys.modules
"""


__all__ = ["plain"]  # a fixture


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "run"
    run = make_run(3, experiment=Predicting(), parallel=config.Parallel("fsdp", min_shard_size=0, devices=4))
    train(run, folder, verbose=False)
    return folder


def elsewhere(program: str, *arguments: Path, cwd: Path) -> str:
    """The output of a Python program in a process and a folder of its own."""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(), "PATH": ""}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_safetensors_hold_every_variable_bit_for_bit(workdir, tmp_path, capsys):
    file, copy = tmp_path / "model.safetensors", tmp_path / "copy.npz"
    assert command(["export", "--format=safetensors", f"--workdir={workdir}", f"--output={file}"]) == 0
    shown = capsys.readouterr().out
    assert elsewhere(ARRAYS, file, copy, cwd=tmp_path) == "[('experiment', 'Predicting'), ('step', '3')]\n"
    variables = load(workdir).variables
    expected = {
        "/".join(str(key.key) for key in keys): np.asarray(x)
        for keys, x in jax.tree_util.tree_leaves_with_path(variables)
    }
    size = sum(x.nbytes for x in expected.values())
    assert shown == f"wrote {file}, step 3 of {workdir}: {len(expected)} arrays, {size:,} bytes\n"
    found = np.load(copy)
    assert set(found) == set(expected) > {"params/dense/kernel", "batch_stats/norm/mean"}
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert found[name].tobytes() == x.tobytes()


@pytest.mark.parametrize("examples", [1, 13])
def test_stablehlo_predicts_batches_of_any_size_from_what_predict_uses(workdir, examples, tmp_path, capsys):
    file, given, found = tmp_path / "model.stablehlo", tmp_path / "batch.npz", tmp_path / "found.npz"
    assert command(["export", "--format=stablehlo", f"--workdir={workdir}", f"--output={file}"]) == 0
    assert capsys.readouterr().out == (
        f"wrote {file}, step 3 of {workdir}: x float32[batch, 8] → half bfloat16[batch, 3], label int32[batch], "
        "logits float32[batch, 3], odd float32[batch], for cpu, tpu, cuda\n"
    )
    batch = take(Predicting().source("test"), np.arange(examples))
    np.savez(given, x=batch["x"])  # predict does not look at the label
    assert elsewhere(PROGRAM, file, given, found, cwd=tmp_path) == "('cpu', 'tpu', 'cuda')\n"
    for name, expected in load(workdir).predict(batch).items():
        tolerance = 2**-7 if name == "half" else 1e-6
        np.testing.assert_allclose(np.load(found)[name], np.float64(expected), rtol=tolerance, atol=tolerance)


@dataclasses.dataclass
class Sized(Predicting):
    """Its predictions need the size of the batch as a number."""

    def predict(self, variables, batch):
        return {"x": batch["x"] * float(np.zeros(batch["x"].shape[0]).sum())}


def test_predictions_for_one_size_only_cannot_be_exported(tmp_path, capsys):
    train(make_run(3, experiment=Sized()), tmp_path / "run", verbose=False)
    flags = ["--format=stablehlo", f"--workdir={tmp_path}/run", f"--output={tmp_path}/model.stablehlo"]
    assert command(["export", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: predict does not work for a batch of unknown size: ")
    assert "test_export.py:" in error
    assert error.endswith("take sizes from shapes, as x.shape[0] in place of len(x)\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


WRONG = {**WRONG_RESULTS, "constant": "predict uses no entry of its batch"}


@pytest.mark.parametrize("kind", WRONG)
def test_predictions_that_cannot_be_exported_are_one_line(plain, kind, tmp_path, capsys):
    set_kind(plain, kind)
    flags = ["--format=stablehlo", f"--workdir={plain}", f"--output={tmp_path}/model.stablehlo"]
    assert command(["export", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(WRONG[kind], error), error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mask_that_predict_uses_is_an_input(plain, tmp_path, capsys):
    set_kind(plain, "masked")
    file, given, found = tmp_path / "model.stablehlo", tmp_path / "batch.npz", tmp_path / "found.npz"
    assert command(["export", "--format=stablehlo", f"--workdir={plain}", f"--output={file}"]) == 0
    assert ": mask float32[batch], x float32[batch, 8] → a float32[batch], for" in capsys.readouterr().out
    x, mask = take(Returning().source("test"), np.arange(3))["x"], np.array([1, 0, 1], np.float32)
    np.savez(given, x=x, mask=mask)
    elsewhere(PROGRAM, file, given, found, cwd=tmp_path)
    np.testing.assert_allclose(np.load(found)["a"], x[:, 0] * mask)

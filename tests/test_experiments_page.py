"""docs/experiments.md: its own experiment is short and runs outside the repository; its settings are understood."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.gan import GAN
from trainer import Run, config
from trainer.commands.arguments import load_config, make_parser, parse_flags, resolve_arguments

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "experiments.md").read_text()
# The Python blocks by the file name that introduces each.
FILES = dict(re.findall(r"`(\w+\.py)`[^`]*:\n\n```python\n(.*?)```", PAGE, re.DOTALL))


def test_an_experiment_takes_40_lines_and_its_config_15():
    assert set(FILES) == {"tumours.py", "config.py"}
    assert PAGE.count("```python") == 2
    lines = {name: len([line for line in text.splitlines() if line.strip()]) for name, text in FILES.items()}
    assert lines["tumours.py"] <= 40
    assert lines["config.py"] <= 15


@pytest.mark.slow
def test_they_train_and_are_evaluated_in_a_folder_of_their_own(tmp_path):
    assert ROOT not in tmp_path.parents
    for name, text in FILES.items():
        assert "experiments" not in text  # nothing of the repository but the harness
        (tmp_path / name).write_text(text)
    train = ["train", "--config=config.py", "--workdir=run"]
    evaluate = ["evaluate", "--workdir=run"]
    outputs = []
    for command in (train, evaluate):
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *command],
            cwd=tmp_path,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(done.stdout)
    # Logistic regression with scikit-learn finds the same 113 of 113.
    (accuracy,) = re.findall(r"step 200: test accuracy: ([\d.]+)", outputs[0])
    assert float(accuracy) > 0.97
    assert f"test accuracy: {accuracy}\n" in outputs[1]
    assert re.search(r"kernel +30×32 +float32 +decayed +0\.1 ", outputs[0])


def test_settings_of_the_gan_are_those_of_its_config():
    (block,) = re.findall(r"```\noptimizer=(Optimizer\(.*?\n\))", PAGE, re.DOTALL)
    run = load_config(str(ROOT / "configs" / "gan_fashion.py"))
    assert run.optimizer == eval(block, vars(config))
    assert (run.batch_size, run.experiment.kind) == (64, "wgan_gp")


def test_flags_of_the_page_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = re.findall(r"--config\.[\w.]+=[^\s`]+", PAGE)
    parser = make_parser("train", "")
    gan = [flag for flag in flags if "hidden" not in flag]
    run: Run = resolve_arguments(*parse_flags(parser, ["--config=configs/gan_fashion.py", *gan])).run
    experiment = run.experiment
    assert isinstance(experiment, GAN)
    assert (experiment.kind, experiment.classifier) == ("sn_gan", "runs/fashion_mnist@best")
    assert (run.optimizer.eps, run.optimizer.eps_root, run.optimizer.rectify) == (1e-16, 1e-16, True)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:configs|tests|experiments|docs)/\w+\.py", PAGE))))
def test_files_that_are_named_are_there(target):
    assert target == "configs/NAME.py" or (ROOT / target).is_file()

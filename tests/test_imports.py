"""Imports point one way, and TensorFlow stays out."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Modules and packages of trainer/, from the highest layer down; a module imports from its own package or from below.
LAYERS = [
    {"__main__"},
    {"commands"},
    {"dry_run"},
    {"determinism", "loop", "plan", "prove", "replay", "sweep"},
    {"opening"},
    {"divergence"},
    {"session"},
    {"compile_once", "init_from", "moved"},
    {"watch"},
    {"export"},
    {"evaluation", "prediction"},
    {"restore"},
    {"resume"},
    {"checkpoint", "program"},
    {"params", "step"},
    {"guard", "hooks", "keys", "optim"},
    {"observe"},
    {"data", "sharding", "workdir"},
    {"config", "experiment_checks", "optional", "state"},
    {"distributed", "experiment", "report", "rules"},
    {"compilation", "files", "lock"},
    {"metrics"},
    {"errors", "garbage", "versions"},
]
HEIGHT = {name: height for height, layer in enumerate(reversed(LAYERS)) for name in layer}

MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in ("trainer", "experiments", "configs")
    for file in sorted((ROOT / folder).rglob("*.py"))
}
TRAINER = [name for name in MODULES if name.startswith("trainer.")]


def imports(module: str) -> Iterator[str]:
    """The modules that a module imports anywhere in its text; `from package import module` gives the module."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def unit(module: str) -> str:
    """The module or package directly below trainer/ to which a module belongs."""
    return module.split(".")[1]


def top_levels(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", TRAINER)
def test_module_imports_from_its_own_package_or_from_lower_layers(module):
    above = {
        name
        for name in imports(module)
        if name.startswith("trainer.") and unit(name) != unit(module) and HEIGHT[unit(name)] >= HEIGHT[unit(module)]
    }
    assert above == set()


def test_every_module_has_its_layer():
    assert {unit(name) for name in TRAINER} == set(HEIGHT)


def test_there_is_no_cycle_of_imports():
    graph = {module: {name for name in imports(module) if name in MODULES} for module in MODULES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(MODULES)


@pytest.mark.parametrize("module", ["trainer", *TRAINER])
def test_trainer_knows_no_experiment_no_config_file_and_no_tensorflow(module):
    assert top_levels(module).isdisjoint({"experiments", "configs", "tests", "tensorflow", "sklearn"})


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("experiments.")])
def test_experiment_imports_only_what_tasks_are_made_of(module):
    assert top_levels(module).isdisjoint({"configs", "tests", "tensorflow"})
    used = {unit(name) for name in imports(module) if name.startswith("trainer.")}
    assert used <= {"config", "data", "errors", "experiment", "metrics", "report"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("configs.")])
def test_config_imports_only_experiments_and_config_types(module):
    used = {name for name in imports(module) if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in used if not name.startswith("experiments.")} == {"trainer.config"}


@pytest.mark.slow
def test_training_and_evaluating_on_digits_never_imports_tensorflow(data_dir, tmp_path):
    tensorflow = tmp_path / "path" / "tensorflow"
    tensorflow.mkdir(parents=True)
    (tensorflow / "__init__.py").write_text("raise SystemExit('tensorflow is imported')")
    code = f"""
import sys
from configs.digits import get_config
from trainer import train

run = get_config()
run.total_steps, run.optimizer.schedule.run_steps = 2, 1000
run.experiment.data_dir, run.experiment.model, run.experiment.hidden = {str(data_dir)!r}, "mlp", None
assert int(train(run, {str(tmp_path / "run")!r}).step) == 2
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tensorflow.parent)])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")

"""`import trainer` gives what a user needs, at once, and says so when it is not the only package of that name."""

import ast
import dataclasses
import importlib
import importlib.util
import os
import pkgutil
import rlcompleter
import subprocess
import sys
import types
from pathlib import Path

import pytest

import trainer
from trainer import config, errors

ROOT = Path(__file__).parents[1]
# Other names are added here when they are made public; none is taken away.
NAMES = {
    *("Checkpoint", "Evaluation", "Group", "Loading", "Logging", "Optimizer", "Parallel", "Run", "Schedule", "setting"),
    *("Watch", "Numerics", "InitFrom", "HostError", "Sweep"),
    *("train", "evaluate", "TrainState", "Experiment", "Mean", "replica_axis", "ArraySource", "Mixture", "TfdsSource"),
    *("ParquetSource", "HuggingFaceSource"),
    *("adabelief", "scale_by_belief", "from_optax", "load", "Trained", "take"),
    *("UserError", "NotPreparedError", "CollectiveError", "DivergedError", "Interrupted"),
}


def declared() -> dict[str, str]:
    """The module of each name that type checkers see."""
    tree = ast.parse((ROOT / "trainer" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "without `as` a type checker takes the name for a private one"
            found[alias.name] = str(node.module)
    return found


def call(code: str, *path: Path) -> tuple[str, str]:
    """Standard output and standard error of a script that imports from the checkout, then from `path`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout, result.stderr


def test_the_names_are_those_that_a_user_needs():
    assert set(vars(trainer)["__all__"]) == NAMES


def test_type_checkers_see_the_names_that_there_are():
    assert set(declared()) == NAMES
    for name, module in declared().items():
        assert getattr(trainer, name) is getattr(importlib.import_module(module), name), name


def test_every_config_dataclass_and_every_error_is_public():
    dataclass = {name for name, value in vars(config).items() if dataclasses.is_dataclass(value)}
    error = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert dataclass | error <= NAMES


def test_dir_and_star_and_completion_give_the_names():
    assert set(dir(trainer)) == NAMES
    names: dict = {}
    exec("from trainer import *", names)
    assert set(names) - {"__builtins__"} == NAMES
    completer = rlcompleter.Completer({"trainer": trainer})
    assert [completer.complete("trainer.scale", i) for i in range(2)] == ["trainer.scale_by_belief(", None]


def test_a_function_and_no_module_is_called_evaluate():
    assert isinstance(trainer.evaluate, types.FunctionType)
    assert importlib.util.find_spec("trainer.evaluate") is None


def test_no_module_takes_the_place_of_a_name_when_it_is_imported():
    assert {module.name for module in pkgutil.iter_modules(trainer.__path__)}.isdisjoint(NAMES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'trian'"):
        getattr(trainer, "trian")  # noqa: B009 - as an attribute, the type checker would report it
    with pytest.raises(ImportError):
        exec("from trainer import trian")


def test_importing_and_listing_names_imports_no_jax():
    assert call("import sys, trainer; dir(trainer); print({'jax', 'numpy'} & set(sys.modules))") == ("set()\n", "")


@pytest.mark.parametrize("name", ["trainer-0.0.36", "coqui_tts_trainer-0.4.0"])
def test_another_distribution_with_this_import_name_is_one_line_at_import(name, tmp_path):
    (tmp_path / f"{name}.dist-info").mkdir()
    out, err = call("import trainer; trainer.UserError; import trainer.errors; print('imported')", tmp_path)
    assert out == "imported\n"
    assert err == (
        f"note: {name} also provides an import package `trainer`; this one is belief-trainer's, from "
        f"{ROOT / 'trainer'}: keep them in separate environments\n"
    )


def test_other_distributions_are_no_reason_to_say_anything(tmp_path):
    for name in ("belief_trainer-0.1.0", "trainer_tools-1.0", "kubeflow_trainer_api-2.3"):
        (tmp_path / f"{name}.dist-info").mkdir()
    assert call("import trainer", tmp_path) == ("", "")


def test_worker_processes_do_not_repeat_the_line(tmp_path):
    (tmp_path / "trainer-0.0.36.dist-info").mkdir()
    code = (
        "import importlib, multiprocessing, trainer\n"
        "worker = multiprocessing.get_context('spawn').Process(target=importlib.import_module, args=('trainer',))\n"
        "worker.start()\nworker.join()\nprint(worker.exitcode)"
    )
    out, err = call(code, tmp_path)
    assert (out, err.count("\n")) == ("0\n", 1)

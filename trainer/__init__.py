"""A Flax/Linen training harness. Usage: `import trainer`, then `trainer.train(run, workdir)`."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # isort: off
    from trainer.config import Checkpoint as Checkpoint, Evaluation as Evaluation, Group as Group, InitFrom as InitFrom
    from trainer.config import Loading as Loading, Logging as Logging, Numerics as Numerics, Optimizer as Optimizer
    from trainer.config import Parallel as Parallel, Run as Run, Schedule as Schedule, Sweep as Sweep
    from trainer.config import Watch as Watch, setting as setting
    from trainer.data import ArraySource as ArraySource, take as take
    from trainer.data.hf import HuggingFaceSource as HuggingFaceSource
    from trainer.data.mixture import Mixture as Mixture
    from trainer.data.parquet import ParquetSource as ParquetSource
    from trainer.data.tfds import TfdsSource as TfdsSource
    from trainer.distributed import Interrupted as Interrupted
    from trainer.errors import CollectiveError as CollectiveError, DivergedError as DivergedError
    from trainer.errors import HostError as HostError, NotPreparedError as NotPreparedError, UserError as UserError
    from trainer.evaluation import evaluate as evaluate
    from trainer.experiment import Experiment as Experiment, replica_axis as replica_axis
    from trainer.loop import train as train
    from trainer.metrics import Mean as Mean
    from trainer.optim.adabelief import adabelief as adabelief, scale_by_belief as scale_by_belief
    from trainer.optim.migrate import from_optax as from_optax
    from trainer.restore import Trained as Trained, load as load
    from trainer.state import TrainState as TrainState
else:
    # Makes each import above when its name is first used: importing JAX takes a second, and `--help` need not wait.
    _EXPORTS = {
        "trainer.config": "Checkpoint Evaluation Group InitFrom Loading Logging Numerics Optimizer Parallel Run "
        "Schedule Sweep Watch setting",
        "trainer.data": "ArraySource take",
        "trainer.data.hf": "HuggingFaceSource",
        "trainer.data.mixture": "Mixture",
        "trainer.data.parquet": "ParquetSource",
        "trainer.data.tfds": "TfdsSource",
        "trainer.distributed": "Interrupted",
        "trainer.errors": "CollectiveError DivergedError HostError NotPreparedError UserError",
        "trainer.evaluation": "evaluate",
        "trainer.experiment": "Experiment replica_axis",
        "trainer.loop": "train",
        "trainer.metrics": "Mean",
        "trainer.optim.adabelief": "adabelief scale_by_belief",
        "trainer.optim.migrate": "from_optax",
        "trainer.restore": "Trained load",
        "trainer.state": "TrainState",
    }
    _MODULES = {name: module for module, names in _EXPORTS.items() for name in names.split()}
    __all__ = sorted(_MODULES)

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'trainer' has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        return __all__


def _report_namesakes() -> None:
    """Writes one line to stderr if Coqui's `trainer` is installed, whose import package has the same name."""
    patterns = ("trainer-*.*-info", "coqui_tts_trainer-*.*-info")
    found = sorted({path.stem for entry in sys.path for pattern in patterns for path in Path(entry).glob(pattern)})
    if found and importlib.import_module("multiprocessing").parent_process() is None:  # not in every worker process
        ours = f"this one is belief-trainer's, from {Path(__file__).parent}: keep them in separate environments"
        print(f"note: {', '.join(found)} also provides an import package `trainer`; {ours}", file=sys.stderr)


_report_namesakes()

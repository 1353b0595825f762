"""The typed description of a run: every setting is declared once, here, and checked once, before any device is touched.

A config file's `get_config()` returns a `Run`. Fields are overridden on the command line by their path, such as
`--config.optimizer.groups.decayed.weight_decay=0.1`. In a workdir the run is kept as JSON.
"""

from trainer.config.checks import check_path, check_types, differences, from_json, resolve
from trainer.config.encoding import to_json
from trainer.config.schedules import DESCENTS, check_schedule
from trainer.config.settings import (
    Checkpoint,
    Evaluation,
    Group,
    Loading,
    Logging,
    Optimizer,
    Parallel,
    Run,
    Schedule,
    setting,
)

__all__ = [
    "DESCENTS",
    "Checkpoint",
    "Evaluation",
    "Group",
    "Loading",
    "Logging",
    "Optimizer",
    "Parallel",
    "Run",
    "Schedule",
    "check_path",
    "check_schedule",
    "check_types",
    "differences",
    "from_json",
    "resolve",
    "setting",
    "to_json",
]

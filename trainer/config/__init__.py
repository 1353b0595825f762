"""The typed description of a run: every setting is declared once, here, and checked once, before any device is touched.

A config file's `get_config()` returns a `Run`. Fields are overridden on the command line by their path, such as
`--config.optimizer.groups.decayed.weight_decay=0.1`. In a workdir the run is kept as JSON.
"""

from trainer.config.checks import check_types as check_types
from trainer.config.checks import in_steps as in_steps
from trainer.config.checks import resolve as resolve
from trainer.config.checks import schedules as schedules
from trainer.config.checks import setting_at as setting_at
from trainer.config.checks import type_name as type_name
from trainer.config.encoding import differences as differences
from trainer.config.encoding import from_json as from_json
from trainer.config.encoding import import_file as import_file
from trainer.config.encoding import to_json as to_json
from trainer.config.settings import Checkpoint as Checkpoint
from trainer.config.settings import Evaluation as Evaluation
from trainer.config.settings import Group as Group
from trainer.config.settings import Loading as Loading
from trainer.config.settings import Logging as Logging
from trainer.config.settings import Optimizer as Optimizer
from trainer.config.settings import Parallel as Parallel
from trainer.config.settings import Run as Run
from trainer.config.settings import Schedule as Schedule
from trainer.config.settings import setting as setting

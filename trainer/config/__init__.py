"""The typed description of a run: every setting is declared once, here, and checked once, before any device is touched.

A config file's `get_config()` returns a `Run`. Fields are overridden on the command line by their path, such as
`--config.optimizer.groups.decayed.weight_decay=0.1`. In a workdir the run is kept as JSON.
"""

# isort: off
from trainer.config.changes import Change as Change, changed_settings as changed_settings
from trainer.config.checks import check_types as check_types, resolve as resolve
from trainer.config.checks import schedules_of as schedules_of, setting_at as setting_at, type_name as type_name
from trainer.config.encoding import from_json as from_json, import_file as import_file, to_json as to_json
from trainer.config.encoding import user_errors as user_errors
from trainer.config.schedules import evaluation_of as evaluation_of
from trainer.config.schedules import evaluations as evaluations, evaluations_in_steps as evaluations_in_steps
from trainer.config.schedules import number_text as number_text, schedule_in_steps as schedule_in_steps
from trainer.config.settings import Checkpoint as Checkpoint, Evaluation as Evaluation, Group as Group
from trainer.config.settings import InitFrom as InitFrom, Loading as Loading, Logging as Logging
from trainer.config.settings import Numerics as Numerics, Optimizer as Optimizer, Parallel as Parallel, Run as Run
from trainer.config.settings import Schedule as Schedule, Watch as Watch
from trainer.config.sweep import Sweep as Sweep
from trainer.config.optimizer import FUSED_OPTIMIZERS as FUSED_OPTIMIZERS, Transform as Transform, setting as setting

"""The workdirs of a sweep's cells, each with the settings of its cell.

Until any cell has a checkpoint, a sweep with other settings may write them there. After that, other settings that
change the updates are an error.
"""

from collections.abc import Sequence
from typing import Any

from trainer import config
from trainer.errors import UserError
from trainer.files import DamagedError
from trainer.sweep.cells import Cell
from trainer.sweep.results import Results
from trainer.workdir import Workdir


def check_workdirs(cells: Sequence[Cell], results: Results) -> None:
    """Raises `UserError` if cells have begun with other settings than these. Changes nothing."""
    places = [(cell, Workdir(results.workdir(cell))) for cell in cells]
    for _, place in places:
        place.check()
    if not any(place.has_checkpoint() for _, place in places):
        return  # nothing is lost by other settings
    for cell, place in places:
        kept = _kept(place)
        changes = [] if kept is None else config.changed_settings(kept, cell.run)
        if changed := [change.text for change in changes if not change.harmless]:
            raise UserError(f"{place.other_settings(cell.run, changed)}; choose another --workdir for the sweep")


def write_settings(cells: Sequence[Cell], results: Results) -> None:
    """Makes the workdir of each cell, with its settings, so that a config file that is edited later changes nothing."""
    for cell in cells:
        place = Workdir(results.workdir(cell))
        try:
            results.workdir(cell).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"nothing can be written in {results.folder}: {error.strerror or error}") from error
        kept = _kept(place)
        if kept is None or config.changed_settings(kept, cell.run):
            place.write(cell.run, None, place.accepted())


def _kept(place: Workdir) -> Any:
    """The JSON of the run in a workdir; None if there is none, or if it is damaged and to be written again."""
    try:
        return place.stored_json()
    except DamagedError:
        return None

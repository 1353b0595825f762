"""Reports a file that cannot be written for a while: one line when that begins, one when it ends."""

from collections.abc import Callable
from os import PathLike

from trainer.files import host_error


class Outage:
    """Turns the errors of one writer into two lines for each outage, or into `HostError`."""

    def __init__(
        self,
        place: PathLike[str],
        meanwhile: str,
        report: Callable[[str], None],
        *,
        afterwards: str = "nothing is missing",
        is_fatal: bool = False,
    ) -> None:
        """Reports errors of `place`: what happens `meanwhile`, and what is true `afterwards`."""
        self._place, self._meanwhile, self._afterwards, self._report = place, meanwhile, afterwards, report
        self.is_fatal, self.is_on = is_fatal, False

    def attempt(self, action: Callable[[], object]) -> bool:
        """Whether an action that may raise `OSError` succeeds. If `is_fatal`, its error is raised as a `HostError`."""
        try:
            action()
        except OSError as error:
            was_on, self.is_on = self.is_on, True
            if self.is_fatal:
                raise host_error(self._place, error) from error
            if not was_on:
                self._report(f"warning: {self._place}: {error.strerror or error}; {self._meanwhile}")
            return False
        if self.is_on:
            self.is_on = False
            self._report(f"note: {self._place}: written again, and {self._afterwards}")
        return True

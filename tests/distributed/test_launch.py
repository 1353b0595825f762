"""The output of a process group: real processes that print what Gloo prints when its threads write at once."""

import subprocess
import sys

import pytest

_REPORT = "[Gloo] Rank 1 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3\n"
_MIXED = (
    "[Gloo] Rank [Gloo] Rank 10 is connected to  is connected to 33 peer ranks.  peer ranks. "
    "Expected number of connected peer ranks is : Expected number of connected peer ranks is : 3\n3\n\n"
)
_SPLIT = (
    "[Gloo] Rank 1\n is connected to 3 peer ranks. \nExpected number of connected peer ranks is : \n3\n"
    " is connected to 12 peer ranks. Expected number of connected peer ranks is : 12\n"
)


_GROUP = """
import sys
from trainer.distributed.launch import ProcessGroup

with ProcessGroup([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), devices=1) as group:
    sys.exit(group.wait())
"""


def shown(said: str, processes: int) -> list[str]:
    """The lines of a group of processes that print a text each. JAX warns of a fork in the process of the tests."""
    command = [sys.executable, "-c", _GROUP, f"print({said!r}, end='')", str(processes)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()


@pytest.mark.parametrize(
    "report", [_REPORT, _MIXED, _SPLIT, _REPORT + _SPLIT + _MIXED], ids=["whole", "mixed", "split", "all"]
)
def test_gloos_report_is_left_out_however_its_threads_mix_it_and_every_other_line_is_shown(report):
    lines = shown(f"step 1\n7\n\n{report}step 2\n8\n\nlast", 2)
    for index in (0, 1):
        own = [line[4:] for line in lines if line.startswith(f"[{index}] ")]
        assert own == ["step 1", "7", "", "step 2", "8", "", "last"]
    assert len(lines) == 14


def test_a_line_that_begins_in_the_middle_of_gloos_report_is_shown():
    said = "[Gloo] Rank 1 is connected to 3 peer ranks. step 5/20  loss 1.5\n3\nstep 6/20  loss 1.4\n"
    assert shown(said, 1) == ["[0] step 5/20  loss 1.5", "[0] step 6/20  loss 1.4"]

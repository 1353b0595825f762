"""The output of a process group: real processes that print what Gloo prints when its threads write at once."""

import sys

import pytest

from trainer.distributed.launch import ProcessGroup

_REPORT = "[Gloo] Rank 1 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3\n"
_MIXED = (
    "[Gloo] Rank [Gloo] Rank 10 is connected to  is connected to 33 peer ranks.  peer ranks. "
    "Expected number of connected peer ranks is : Expected number of connected peer ranks is : 3\n3\n\n"
)
_SPLIT = (
    "[Gloo] Rank 1\n is connected to 3 peer ranks. \nExpected number of connected peer ranks is : \n3\n"
    " is connected to 12 peer ranks. Expected number of connected peer ranks is : 12\n"
)


@pytest.mark.parametrize(
    "report", [_REPORT, _MIXED, _SPLIT, _REPORT + _SPLIT + _MIXED], ids=["whole", "mixed", "split", "all"]
)
def test_gloos_report_is_left_out_however_its_threads_mix_it_and_every_other_line_is_shown(report, capfd):
    said = f"step 1\n7\n\n{report}step 2\n8\n\nlast"
    with ProcessGroup([sys.executable, "-c", f"print({said!r}, end='')"], processes=2, devices=1) as group:
        assert group.wait() == 0
    lines = capfd.readouterr().out.splitlines()
    for index in (0, 1):
        shown = [line[4:] for line in lines if line.startswith(f"[{index}] ")]
        assert shown == ["step 1", "7", "", "step 2", "8", "", "last"]
    assert len(lines) == 14


def test_a_line_that_begins_in_the_middle_of_gloos_report_is_shown(capfd):
    said = "[Gloo] Rank 1 is connected to 3 peer ranks. step 5/20  loss 1.5\n3\nstep 6/20  loss 1.4\n"
    with ProcessGroup([sys.executable, "-c", f"print({said!r}, end='')"], processes=1, devices=1) as group:
        assert group.wait() == 0
    assert capfd.readouterr().out == "[0] step 5/20  loss 1.5\n[0] step 6/20  loss 1.4\n"

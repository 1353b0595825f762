"""Names the processes that hold up the others."""

from collections.abc import Mapping

_TOGETHER = ("device", "processes")  # waits that end only when every process has reached the same point
DOING = {
    "starting": "starting",
    "compile": "compiling",
    "data": "waiting for its data",
    "device": "waiting for its devices",
    "processes": "waiting for the other processes",
    "save": "saving",
    "evaluate": "evaluating",
}
"""The text for each activity of a process."""


def held_up(states: Mapping[int, tuple[int, str, float]], now: float) -> dict[int, str]:
    """The processes that hold up the others, and what each does.

    These are the processes that wait for no other one. If all wait, they are those at the lowest step.

    Args:
      states: for each process its step, its activity, and the time at which the activity began.
      now: in seconds, on the same clock.
    """
    alone = [i for i, (_, activity, _) in states.items() if activity not in _TOGETHER]
    lowest = min(step for step, _, _ in states.values())
    named = alone or [i for i, (step, _, _) in states.items() if step == lowest]
    texts = {}
    for i in named:
        step, activity, since = states[i]
        texts[i] = f"has been {DOING.get(activity, activity)} at step {step} for {now - since:.0f} s"
    return texts

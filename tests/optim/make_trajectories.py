"""Makes trajectories.json with the optimizer of the paper's authors; the tests themselves need no torch.

In an environment of its own, with Python 3.11 on a CPU:

    pip install torch==2.13.0 adabelief-pytorch==0.2.1 numpy==2.4.6
    python tests/optim/make_trajectories.py

The file holds the start, the gradients and, for each case, the options in the names of `trainer.optim.adabelief` and
the parameters after every tenth step. JSON keeps float64 to the bit.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

STEPS, EVERY = 300, 10

# A list is a rate for each step: five steps of warmup, then decay.
SCHEDULE = [round(0.02 * min(1, (t + 1) / 5) / (1 + 0.01 * t), 6) for t in range(STEPS)]
DECOUPLED = {"weight_decay": 0.1, "decay": "decoupled"}
COUPLED = {"weight_decay": 0.01, "decay": "coupled"}
FIXED = {"weight_decay": 0.002, "decay": "fixed"}

CASES: dict[str, dict[str, Any]] = {
    "eps=1e-16": {},
    "eps=1e-12": {"eps": 1e-12},
    "eps=1e-8": {"eps": 1e-8},
    "eps=1e-3": {"eps": 1e-3},
    "b1=0.5, b2=0.99": {"b1": 0.5, "b2": 0.99},
    "decoupled": DECOUPLED,
    "coupled": COUPLED,
    "fixed": FIXED,
    "rectify": {"rectify": True},
    "rectify, still": {"rectify": True, "sgd_fallback": False},
    "rectify, eps=1e-3": {"rectify": True, "eps": 1e-3},
    "rectify, b2=0.9": {"rectify": True, "b2": 0.9},
    "rectify, decoupled": {"rectify": True, **DECOUPLED},
    "rectify, still, fixed": {"rectify": True, "sgd_fallback": False, **FIXED},
    "rectify, coupled": {"rectify": True, **COUPLED},
    "amsgrad": {"amsgrad": True},
    "amsgrad, eps=1e-3": {"amsgrad": True, "eps": 1e-3},
    "amsgrad, b2=0.9": {"amsgrad": True, "b2": 0.9},
    "amsgrad, coupled": {"amsgrad": True, **COUPLED},
    "schedule": {"learning_rate": SCHEDULE},
    "schedule, decoupled": {"learning_rate": SCHEDULE, **DECOUPLED},
    "schedule, coupled": {"learning_rate": SCHEDULE, **COUPLED},
    "schedule, fixed": {"learning_rate": SCHEDULE, **FIXED},
    "schedule, rectify": {"learning_rate": SCHEDULE, "rectify": True},
    "schedule, amsgrad": {"learning_rate": SCHEDULE, "amsgrad": True},
}


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Parameters that move away from zero, and gradients of five scales whose noise shrinks after 100 steps.

    Few digits keep the file small; shrinking noise makes s fall, without which AMSGrad's maximum would be idle.
    """
    rng = np.random.default_rng(2010_07468)
    start = np.array([1.5, -0.75, 2.0, -1.0, 0.5])
    noise = rng.uniform(-1, 1, (STEPS, 5)) * np.where(np.arange(STEPS) < 100, 0.8, 0.2)[:, None]
    return start, np.round(-np.sign(start) * np.array([0.1, 0.5, 1, 3, 10]) * (1 + noise), 4)


def trajectory(
    start: np.ndarray,
    grads: np.ndarray,
    *,
    learning_rate: float | list[float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    decay: str = "decoupled",
    rectify: bool = False,
    sgd_fallback: bool = True,
    amsgrad: bool = False,
) -> list[list[float]]:
    """Parameters after every tenth step of the authors' AdaBelief, which has one eps for both places."""
    import torch  # pyrefly: ignore[missing-import] - only who remakes the file has it
    from adabelief_pytorch import AdaBelief  # pyrefly: ignore[missing-import] - only who remakes the file has it

    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = AdaBelief(
            [p],
            lr=1.0,  # set anew before each step
            betas=(b1, b2),
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            weight_decouple=decay != "coupled",
            fixed_decay=decay == "fixed",
            rectify=rectify,
            degenerated_to_sgd=sgd_fallback,
            print_change_log=False,
        )
    found = []
    for t, g in enumerate(grads):
        optimizer.param_groups[0]["lr"] = learning_rate[t] if isinstance(learning_rate, list) else learning_rate
        p.grad = torch.tensor(g, dtype=torch.float64)  # new each time: coupled decay is added to it in place
        optimizer.step()
        if (t + 1) % EVERY == 0:
            found.append(p.tolist())
    return found


def main() -> None:
    start, grads = problem()
    cases = []
    for name, case in CASES.items():
        options: dict[str, Any] = {"learning_rate": 0.01, "eps": 1e-16} | case
        params = trajectory(start, grads, **options)
        cases.append((json.dumps(name), json.dumps(options | {"eps_root": options["eps"]}), table(params)))
    text = (
        f'{{"every": {EVERY},\n"start": {json.dumps(start.tolist())},\n"grads": {table(grads.tolist())},\n"cases": {{\n'
    )
    text += ",\n".join(f'{name}: {{"options": {options},\n"params": {params}}}' for name, options, params in cases)
    Path(__file__).with_name("trajectories.json").write_text(text + "\n}}\n")


def table(rows: list[list[float]]) -> str:
    """JSON with a line for each row, so that a change shows in a diff."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


if __name__ == "__main__":
    main()

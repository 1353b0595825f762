"""SGD with momentum, Adam and AdaBelief on four functions of two variables, and a picture of their trajectories.

    python -m trainer train --config=configs/toy.py --workdir=runs/toy

Cost: 15 seconds on 2 CPU cores. Expected: a picture in runs/toy/reports, where AdaBelief arrives first everywhere.
First step from which the distance to the minimum stays within 0.01:

                   SGD    Adam  AdaBelief
    |x| + |y|    2,500   2,500        400
    valley      12,900   7,160      2,550
    Rosenbrock  11,260  10,710      7,670
    Beale       11,950   7,130      2,050

AdaBelief comes before Adam at rates from 3e-4 to 3e-3 and distances from 0.01 to 0.1. SGD's place depends on the rate
and on the distance: it is the first within 0.1 on Rosenbrock's function, and with `lr_multiplier=1` the first
everywhere.
"""

from experiments.toy import Toy
from trainer.config import Checkpoint, Group, Logging, Optimizer, Parallel, Run, Schedule


def get_config() -> Run:
    """Twelve points for 14,000 steps at a constant learning rate: 1e-3 for Adam and AdaBelief, 1e-4 for SGD."""
    return Run(
        experiment=Toy(),
        total_steps=14_000,
        batch_size=1,
        optimizer=Optimizer(
            schedule=Schedule("constant", peak=1e-3),
            eps=1e-8,
            labels=((r".*/sgd", "sgd"), (r".*/adam", "adam"), (r".*/adabelief", "adabelief")),
            groups={
                # SGD's momentum is a sum of gradients. `lr_multiplier` is 1 − b1 = 0.1, which makes the update that of
                # a mean, as in Adam and AdaBelief.
                "sgd": Group(optimizer="sgd", lr_multiplier=0.1),
                "adam": Group(optimizer="adam"),
                "adabelief": Group(optimizer="adabelief"),
            },
        ),
        checkpoint=Checkpoint(every_steps=2000),
        logging=Logging(every_steps=10),
        parallel=Parallel(devices=1),  # one example has nothing to split
    )

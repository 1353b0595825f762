"""The progression of diabetes from ten measurements of 442 patients, with the shortest experiment.

    pip install scikit-learn
    python -m trainer train --config=configs/diabetes.py --workdir=runs/diabetes

Cost: 5 seconds of CPU time. Expected: test r2: 0.4637, the share of the variance that the MLP explains for 88 patients
(loss 0.5370). Least squares on the same split explains 0.4476 of it (loss 0.5531).
"""

from experiments.regression import Regression
from trainer.config import Evaluation, Group, Optimizer, Run, Schedule


def get_config() -> Run:
    """An MLP with 64 hidden units for 300 steps of 64 patients, about 54 epochs."""
    labels = ((r".*/kernel", "decayed"), (r".*/bias", "plain"))
    groups = {"decayed": Group(weight_decay=0.1), "plain": Group()}
    optimizer = Optimizer(schedule=Schedule("cosine", peak=1e-3), labels=labels, groups=groups)
    run = Run(Regression(hidden=64, dropout=0.3), total_steps=300, batch_size=64, optimizer=optimizer)
    run.evaluation = Evaluation(every_steps=50)
    return run

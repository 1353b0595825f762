"""Handwritten digits, 8×8: the demo.

    python -m trainer prepare --config=configs/digits.py
    python -m trainer train --config=configs/digits.py --workdir=runs/digits

Cost: under a minute on 2 CPU cores. Expected: 98 to 99 % test accuracy.
"""

from experiments.augmentation import Augmentation
from experiments.image_classification import ImageClassification
from trainer.config import Checkpoint, Evaluation, Group, Logging, Optimizer, Run, Schedule


def get_config() -> Run:
    """A strided CNN for 1,000 steps of 64 images (about 45 epochs)."""
    return Run(
        experiment=ImageClassification(
            dataset="digits",
            max_value=16.0,
            widths=(32, 64),
            hidden=128,
            dropout=0.3,
            augmentation=Augmentation(crop=1),
        ),
        total_steps=1000,
        batch_size=64,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=2e-3, warmup=50),
            labels=((r".*/bias", "plain"), (r".*/kernel", "decayed")),
            groups={"decayed": Group(weight_decay=1e-2), "plain": Group()},
        ),
        evaluation=Evaluation(every_steps=250),
        checkpoint=Checkpoint(every_steps=250, best_metric="test/accuracy"),
        logging=Logging(every_steps=50),
    )

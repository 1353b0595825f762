"""Handwritten digits with the convolutions of a Fashion-MNIST classifier: fine-tuning.

    apt-get install dataset-fashion-mnist
    python -m trainer prepare --config=configs/fashion_mnist.py
    python -m trainer train --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    python -m trainer prepare --config=configs/finetune_digits.py
    python -m trainer train --config=configs/finetune_digits.py --workdir=runs/finetune_digits

Cost: under half a minute on 2 CPU cores, after Fashion-MNIST's minute. Expected: 97 to 98 % test accuracy.
"""

from experiments.augmentation import Augmentation
from experiments.image_classification import ImageClassification
from trainer.config import Checkpoint, Evaluation, Group, InitFrom, Logging, Optimizer, Run, Schedule


def get_config() -> Run:
    """300 steps of 64 images: the convolutions at a tenth of the rate of the layers above, which are fresh."""
    return Run(
        experiment=ImageClassification(
            dataset="digits",
            max_value=16.0,
            widths=(32, 64),
            hidden=128,
            dropout=0.3,
            augmentation=Augmentation(crop=1),
        ),
        total_steps=300,
        batch_size=64,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=2e-3, warmup=20),
            labels=((r"conv_\d/.*", "trunk"), (r".*/bias", "plain"), (r".*/kernel", "decayed")),
            groups={"trunk": Group(lr_multiplier=0.1), "decayed": Group(weight_decay=1e-2), "plain": Group()},
        ),
        evaluation=Evaluation(every_steps=100),
        checkpoint=Checkpoint(every_steps=100),
        logging=Logging(every_steps=50),
        init_from=InitFrom("runs/fashion_mnist@best", rules=((r"conv_\d/.*", "take"), (r"(hidden|head)/.*", "fresh"))),
    )

"""CIFAR-10 with DenseNet-121: the settings of AdaBelief's authors.

    python -m trainer prepare --config=configs/cifar10_densenet121.py
    python -m trainer train --config=configs/cifar10_densenet121.py --workdir=runs/cifar10_densenet121

6,956,298 parameters.
`prepare` needs TensorFlow, as TFDS's builder does; training needs none.

Cost: 200 epochs, 6.8e11 floating-point operations a step: a GPU or a TPU. Compiled for v5e:2x4, not trained here.
Expected: the test accuracy that the paper plots for this network (arXiv:2010.07468, section 3).
"""

from experiments.augmentation import Augmentation
from experiments.image_classification import ImageClassification
from trainer.config import Checkpoint, Evaluation, Group, Optimizer, Run, Schedule

EXAMPLES, BATCH, EPOCHS = 50_000, 128, 200


def get_config() -> Run:
    """200 epochs of batch 128; learning rate 1e-3, a tenth of it from epoch 150 on; coupled decay 5e-4 of all."""
    return Run(
        experiment=ImageClassification(
            dataset="cifar10",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            model="densenet121",
            augmentation=Augmentation(crop=4, flip=0.5),
        ),
        total_steps=EPOCHS * EXAMPLES // BATCH,
        batch_size=BATCH,
        optimizer=Optimizer(
            schedule=Schedule("step", peak=1e-3, unit="epochs", boundaries=(150,)),
            eps=1e-8,
            eps_root=1e-8,
            decay="coupled",
            labels=((".*", "all"),),
            groups={"all": Group(weight_decay=5e-4)},
        ),
        evaluation=Evaluation(every_steps=391, batch_size=1000),
        checkpoint=Checkpoint(every_steps=3910, best_metric="test/accuracy"),
    )

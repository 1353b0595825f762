"""Fashion-MNIST, 28×28, with a ResNet-18 of a quarter of its width.

    apt-get install dataset-fashion-mnist
    python -m trainer prepare --config=configs/fashion_mnist_resnet18.py
    python -m trainer train --config=configs/fashion_mnist_resnet18.py --workdir=runs/fashion_mnist_resnet18

Cost: 16 minutes on 2 CPU cores. Expected: 93.3 % test accuracy after 6 epochs.
"""

from experiments.augmentation import Augmentation
from experiments.image_classification import ImageClassification
from trainer.config import Checkpoint, Evaluation, Group, Logging, Optimizer, Run, Schedule

EXAMPLES, BATCH, EPOCHS = 60_000, 128, 6


def get_config() -> Run:
    """701,178 parameters, for 6 epochs of 60,000 images, half of them flipped."""
    return Run(
        experiment=ImageClassification(
            dataset="fashion_mnist_local",
            mean=(0.286,),
            std=(0.353,),
            model="resnet18",
            widths=(16, 32, 64, 128),
            augmentation=Augmentation(flip=0.5),
        ),
        total_steps=EPOCHS * EXAMPLES // BATCH,
        batch_size=BATCH,
        optimizer=Optimizer(
            schedule=Schedule("linear", peak=3e-3, warmup=500),
            labels=((r".*/kernel", "decayed"), (r".*/(bias|scale)", "plain")),
            groups={"decayed": Group(weight_decay=2e-2), "plain": Group()},
        ),
        evaluation=Evaluation(every_steps=469, batch_size=512),
        checkpoint=Checkpoint(every_steps=469, best_metric="test/accuracy"),
        logging=Logging(every_steps=50),
    )

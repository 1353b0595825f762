"""ImageNet with ResNet-18: the settings of AdaBelief's authors.

    pip install 'belief-trainer[images]'
    python -m trainer prepare --config=configs/imagenet_resnet18.py
    python -m trainer train --config=configs/imagenet_resnet18.py --workdir=runs/imagenet_resnet18

11,689,512 parameters. JPEG files are decoded in worker processes, in training as random crops of 224×224 pixels.
`prepare` needs TensorFlow, as TFDS's builder does, and the archives from image-net.org; training needs none.

Cost: 90 epochs, 2.8e12 floating-point operations a step. Compiled for v5e:4x4, not trained here.
Expected: 70.08 % validation accuracy, as the paper has it (arXiv:2010.07468).
"""

from experiments.augmentation import Augmentation
from experiments.image_classification import EncodedImageClassification
from trainer.config import Checkpoint, Evaluation, Group, Loading, Optimizer, Run, Schedule

EXAMPLES, BATCH, EPOCHS = 1_281_167, 256, 90


def get_config() -> Run:
    """90 epochs of batch 256; learning rate 1e-3, a tenth of it from epochs 70 and 80 on; decoupled decay 1e-2."""
    return Run(
        experiment=EncodedImageClassification(
            dataset="imagenet2012",
            classes=1000,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            model="resnet18",
            stem="imagenet",
            augmentation=Augmentation(flip=0.5),
            dtype="bfloat16",
        ),
        total_steps=EPOCHS * EXAMPLES // BATCH,
        batch_size=BATCH,
        optimizer=Optimizer(
            schedule=Schedule("step", peak=1e-3, unit="epochs", boundaries=(70, 80)),
            eps=1e-8,
            eps_root=1e-8,
            labels=((".*", "all"),),
            groups={"all": Group(weight_decay=1e-2)},
        ),
        loading=Loading(workers=16),
        evaluation=Evaluation("validation", every_steps=5000, batch_size=1024),
        checkpoint=Checkpoint(every_steps=5000, best_metric="validation/accuracy"),
    )

"""ImageNet with ViT-S/16: AdaBelief as its authors set it for transformers.

    pip install 'belief-trainer[images]'
    python -m trainer prepare --config=configs/imagenet_vit_s16.py
    python -m trainer train --config=configs/imagenet_vit_s16.py --workdir=runs/imagenet_vit_s16

22,050,664 parameters. AdaBelief's authors train no transformer on images: eps and rectification are theirs for a
transformer; learning rate, its schedule, decay, batch and mixup are those of Beyer et al. (2022, arXiv:2205.01580), who
train this model with Adam. JPEG files are decoded in worker processes, in training as random crops of 224×224 pixels.
`prepare` needs TensorFlow, as TFDS's builder does, and the archives from image-net.org; training needs none.

Cost: 90 epochs, 2.8e13 floating-point operations a step. Compiled for v5e:4x4, not trained here.
Expected: with Adam, Beyer et al. surpass 76 % validation accuracy, with stronger augmentation than here.
"""

from experiments.augmentation import Augmentation
from experiments.image_classification import EncodedImageClassification
from trainer.config import Checkpoint, Evaluation, Group, Loading, Optimizer, Run, Schedule

EXAMPLES, BATCH, EPOCHS = 1_281_167, 1024, 90


def get_config() -> Run:
    """90 epochs of batch 1,024; cosine from 1e-3 after 10,000 steps of warm-up; decoupled decay 0.1 of the kernels."""
    return Run(
        experiment=EncodedImageClassification(
            dataset="imagenet2012",
            classes=1000,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            model="vit_s16",
            augmentation=Augmentation(flip=0.5, mixup=0.2),
            dtype="bfloat16",
        ),
        total_steps=EPOCHS * EXAMPLES // BATCH,
        batch_size=BATCH,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=1e-3, warmup=10_000),
            eps=1e-16,
            eps_root=1e-16,
            rectify=True,
            clip_norm=1.0,
            labels=((r".*/kernel", "decayed"), (".*", "plain")),
            groups={"decayed": Group(weight_decay=0.1), "plain": Group()},
        ),
        loading=Loading(workers=16),
        evaluation=Evaluation("validation", every_steps=2500, batch_size=1024),
        checkpoint=Checkpoint(every_steps=2500, best_metric="validation/accuracy"),
    )

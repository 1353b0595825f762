"""The AdaBelief paper's LSTM with 1 layer on the words of the Penn Treebank, which is not here.

    mkdir -p data/ptb    # and put ptb.train.txt, ptb.valid.txt and ptb.test.txt there, with 10,000 kinds of words
    python -m trainer train --config=configs/ptb_lstm1.py --workdir=runs/ptb_lstm1

Settings are those of the authors' program. Two things differ. The authors draw random lengths around 70; here every
piece has 70 tokens. The authors' layers have two bias vectors, as in PyTorch; here a layer has one.

Cost: 5.6e10 floating-point operations a step, and 0.067 GiB on a TPU: compiled for v5e:1x1 (`plan`, libtpu 0.0.52).
Expected: not trained here; the metric to compare is test/perplexity.
"""

from experiments.lstm import LSTMLanguageModel
from trainer.config import Checkpoint, Evaluation, Group, Optimizer, Parallel, Run, Schedule


def get_config() -> Run:
    """200 epochs of 664 batches, each with 70 words of 20 streams."""
    return Run(
        experiment=LSTMLanguageModel(
            files="data/ptb/ptb.{split}.txt",
            vocab=10_000,
            length=70,
            streams=20,
            eval_streams=1,
            width=400,
            hidden=1150,
            layers=1,
            word_dropout=0.1,
            input_dropout=0.4,
            weight_dropout=0.5,
            hidden_dropout=0.25,
            output_dropout=0.4,
            activation_penalty=2.0,
            slowness_penalty=1.0,
        ),
        total_steps=200 * 664,
        batch_size=20,
        optimizer=Optimizer(
            schedule=Schedule("step", peak=1e-3, boundaries=(100 * 664, 145 * 664)),
            eps=1e-16,
            eps_root=1e-16,
            decay="coupled",
            clip_norm=0.25,
            labels=((".*", "all"),),
            groups={"all": Group(weight_decay=1.2e-6)},
        ),
        evaluation=Evaluation(split="valid", every_steps=664, batch_size=1),
        evaluations={"test": Evaluation(split="test", batch_size=1)},
        checkpoint=Checkpoint(every_steps=664, best_metric="valid/perplexity", best_mode="min"),
        parallel=Parallel(devices=1),
    )

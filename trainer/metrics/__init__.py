"""Metrics as sums: they add up over microbatches, replicas and batches, and numbers are computed once, at the end."""

from trainer.metrics.classification import AUC as AUC
from trainer.metrics.classification import Accuracy as Accuracy
from trainer.metrics.classification import ConfusionMatrix as ConfusionMatrix
from trainer.metrics.distribution import Histogram as Histogram
from trainer.metrics.distribution import Moments as Moments
from trainer.metrics.mean import Mean as Mean
from trainer.metrics.mean import Metric as Metric
from trainer.metrics.mean import Metrics as Metrics
from trainer.metrics.sums import Perplexity as Perplexity
from trainer.metrics.sums import Sum as Sum
from trainer.metrics.sums import add as add
from trainer.metrics.sums import numbers as numbers

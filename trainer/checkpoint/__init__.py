"""Checkpoints: states with their metadata, written in the background and verified when they are read."""

from trainer.checkpoint.metadata import DataIdentity as DataIdentity
from trainer.checkpoint.metadata import Metadata as Metadata
from trainer.checkpoint.metadata import check_leaves as check_leaves
from trainer.checkpoint.metadata import leaf_differences as leaf_differences
from trainer.checkpoint.metadata import leaves_of as leaves_of
from trainer.checkpoint.metadata import make_metadata as make_metadata
from trainer.checkpoint.metadata import version_changes as version_changes
from trainer.checkpoint.store import Store as Store
from trainer.checkpoint.store import scores as scores

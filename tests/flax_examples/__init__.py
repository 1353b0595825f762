"""Experiments of a user, each with a model of Flax's own examples as it is; tests copy them out of the repository."""

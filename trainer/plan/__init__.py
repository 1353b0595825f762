"""Ahead-of-time compilation of a run for TPU topologies, and tables of memory and communication from XLA's results."""

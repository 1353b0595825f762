"""Compiles a run for TPU topologies that are not there, and reports what the compiler says."""

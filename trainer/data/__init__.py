"""Examples to batches: sources, their order, and the stream of a run."""

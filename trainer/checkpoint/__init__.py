"""Checkpoints of the whole state, what describes them, and stopping in good order."""

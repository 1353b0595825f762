"""The proof that a run survives kills: the real command, killed at random moments, against an undisturbed run."""

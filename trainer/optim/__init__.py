"""The optimizer: AdaBelief, labels, schedules, and how they make one transformation."""

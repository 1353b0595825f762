"""What is seen of a run: metrics files, the progress line, tables."""

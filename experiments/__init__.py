"""Tasks: one file each, with a Linen model, a loss, metrics and a data source."""

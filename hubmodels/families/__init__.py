"""A file per family: its config, its key map, its modules."""

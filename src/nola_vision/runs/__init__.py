"""One run: its config, its id, its row, and how it is executed."""

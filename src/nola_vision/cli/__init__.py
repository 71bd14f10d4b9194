"""The command line: one file per verb, with argument parsing only."""

"""The command line: one file per verb, which parses options, calls the other folders, and prints."""

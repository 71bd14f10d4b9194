"""The data sets: one file per kind."""

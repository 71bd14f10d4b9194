"""Shared by all packages: errors, text, files, validation, progress."""

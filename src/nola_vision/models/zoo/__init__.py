"""Backbones that are part of this package."""

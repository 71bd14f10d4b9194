"""Backbones that come with the package."""

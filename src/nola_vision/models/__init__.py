"""From a timm tag to an adapted model, its file, and what is exported from it."""

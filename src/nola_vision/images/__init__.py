"""Image formats: what a backbone takes, how files are decoded and transformed."""

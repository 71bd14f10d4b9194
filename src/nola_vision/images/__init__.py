"""Images: the format a backbone expects, decoding of files, transforms."""

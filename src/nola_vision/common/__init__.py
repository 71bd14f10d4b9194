"""What every room uses: errors, text, files, validation, progress."""

"""Charts of a cell, drawn by matplotlib: as SVG for the report page and as PNG for files and notebooks."""

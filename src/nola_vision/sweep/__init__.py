"""A grid of runs: planning it (pure) and the engines that carry it out."""

"""A grid of runs: its plan, the queue of pending runs, and the engines that run them."""

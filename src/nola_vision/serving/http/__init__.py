"""The service: routes, the page, the batcher, limits, and the same on Ray Serve."""

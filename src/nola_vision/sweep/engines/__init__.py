"""How the runs of a sweep are executed: worker processes, several devices, a Ray cluster."""

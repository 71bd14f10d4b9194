"""The LightningModules, metrics and schedules."""

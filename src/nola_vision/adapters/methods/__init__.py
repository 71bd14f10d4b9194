"""The methods: one file each, with the settings, the equation and the start."""

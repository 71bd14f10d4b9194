"""Thousands of adapters next to one backbone, from Python (`bank`) and as a service (`nola-vision serve`)."""

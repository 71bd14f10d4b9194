"""Thousands of adapters for one backbone as an HTTP service."""

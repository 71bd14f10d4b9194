"""The engine: methods, and a bank of trained parameters next to a backbone. torch only: no Lightning, no timm."""

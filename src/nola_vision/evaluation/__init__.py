"""What predictions are worth: calibration, and the accuracy estimated by cross-validation. NumPy only."""

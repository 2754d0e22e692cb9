"""Training methods for detectors."""

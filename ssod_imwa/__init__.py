"""Semi-supervised detection under iterative model weight averaging (IMWA)."""

__version__ = "0.1.0"

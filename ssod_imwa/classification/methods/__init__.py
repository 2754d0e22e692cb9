"""Methods of class-imbalanced classification."""

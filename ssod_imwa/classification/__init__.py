"""Class-imbalanced image classification: losses, mixing and evaluation."""

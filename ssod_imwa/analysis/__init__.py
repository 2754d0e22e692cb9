"""What a trained classifier makes of rare classes: features, gradients, weights, decisions."""

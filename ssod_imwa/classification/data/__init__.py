"""Classification data sets: images with labels, imbalance, samplers and views."""

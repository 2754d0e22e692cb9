"""Semi-supervised object detection: detectors, training methods and evaluation."""

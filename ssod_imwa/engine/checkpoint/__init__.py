"""Checkpoints that survive kills, full disks and flipped bits, and resume a run exactly."""

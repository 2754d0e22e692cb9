"""Detectors behind one small interface, `base.Detector`."""

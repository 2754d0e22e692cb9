"""Losses of classification: pure functions, and modules that hold class statistics beside them."""

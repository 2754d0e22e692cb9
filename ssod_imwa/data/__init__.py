"""Data sets, splits, weak and strong views, and the loader that feeds every member."""

"""Losses beside FixMatch's own."""

"""Saved models: what was trained, and the names and hashes of what was not."""

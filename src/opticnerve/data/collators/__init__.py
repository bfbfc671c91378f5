"""Samples side by side as tensors, one collator an objective."""

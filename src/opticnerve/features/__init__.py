"""The cache of frozen encoders' features: computed once, found by content."""

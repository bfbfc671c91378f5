"""A run from its recipe to its card: the story of `opticnerve train`."""

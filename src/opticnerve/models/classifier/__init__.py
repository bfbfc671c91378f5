"""A fusion classifier: image and text, fused early, in the middle or late, and one answer of a set."""

"""A language model with vision or audio towers."""

"""Connectors: an encoder's tokens to vectors of the language model's width."""

"""A record of a data file as conversations, one module a format."""

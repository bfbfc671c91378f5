"""Parts for opticnerve from outside opticnerve."""

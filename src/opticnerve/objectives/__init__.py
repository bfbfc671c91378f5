"""What a stage minimises: a loss sum and how many it is of."""

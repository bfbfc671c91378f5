"""One stage of training: set-up, steps, state, checkpoints."""

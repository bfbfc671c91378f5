"""How soft tokens enter a language model: in its sequence, or between its layers."""

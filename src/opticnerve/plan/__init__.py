"""What a run will cost, foreseen without its weights: `opticnerve plan`."""

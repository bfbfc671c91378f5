"""Data files to batches: sources, formats, datasets, media, token ids, collators."""

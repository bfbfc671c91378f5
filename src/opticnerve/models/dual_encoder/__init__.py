"""A dual encoder (CLIP, SigLIP): pictures and texts in one space."""

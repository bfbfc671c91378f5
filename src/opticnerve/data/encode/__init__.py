"""Conversations as token ids and labels, packed into rows and loaded in batches."""

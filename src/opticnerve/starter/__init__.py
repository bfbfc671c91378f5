"""The embedded default: which packaged weights and which data a first run uses, so that it needs no model hub."""

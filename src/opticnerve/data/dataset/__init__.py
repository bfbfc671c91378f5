"""A data file, or several, as a sequence or a stream of samples."""

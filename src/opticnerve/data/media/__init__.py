"""Pictures, videos and sounds: opening, measuring, augmenting."""

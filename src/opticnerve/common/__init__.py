"""What every other folder may use: whole files, caches, the hub, progress, drawing."""

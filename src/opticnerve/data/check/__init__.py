"""What `opticnerve data check` tells of a data file before anything is trained."""

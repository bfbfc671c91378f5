"""Models in use: loaded, asked, and their answers, likelihoods and vectors."""

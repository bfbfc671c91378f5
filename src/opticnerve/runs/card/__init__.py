"""The card of a run: results, plots and warnings as a page."""

"""Pictures, plots and tables of runs."""

"""Detection data sets: records, readers, splits, and views with boxes."""

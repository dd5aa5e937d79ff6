"""One scorer a file, and what scorers share."""

"""Somebody else's package: one file for each thing that it adds to t2i-align, and no edit of ours."""

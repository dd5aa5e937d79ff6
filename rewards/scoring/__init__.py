"""Scoring many pictures: decoding ahead, shards, clusters, a page."""

"""A package of its own, so that one of this name that some dependency installs does not take its place."""

"""Commands, random numbers, provenance, embedded names."""

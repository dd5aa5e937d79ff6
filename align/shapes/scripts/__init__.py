"""How the embedded pipelines and preferences were made; no part of the library."""

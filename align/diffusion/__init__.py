"""The diffusion algebra."""

"""The one reverse loop and what runs it."""

"""Pictures, rows and preferences in the layouts that people have."""

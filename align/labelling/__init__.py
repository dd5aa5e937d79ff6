"""The page on which people choose between images."""

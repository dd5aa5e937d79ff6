"""What objectives that sample their own images share."""

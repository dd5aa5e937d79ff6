"""What objectives that draw their own pictures share."""

"""What trains and what it is held against."""

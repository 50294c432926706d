"""What the user wrote, as validated data."""

"""What to time: models."""

"""What operations are composed of."""

"""What a model is, and each framework's words for it."""

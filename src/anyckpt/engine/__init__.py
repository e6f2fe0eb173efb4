"""Plans of byte moves, and carrying them out."""

"""What families share; a part takes from no family."""

"""Structure-aware fuzzing of every reader and of what is done with what was read; by hand with ``tools/fuzz.py``."""

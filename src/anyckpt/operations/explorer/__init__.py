"""Pages about checkpoints: each a file of its own that asks for nothing else."""

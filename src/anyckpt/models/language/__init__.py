"""In what words a family is told: its rules, their operations, and other spellings of its names."""

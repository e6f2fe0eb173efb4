"""What users ask for, each a short composition of formats, models and the engine."""

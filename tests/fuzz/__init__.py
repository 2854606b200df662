"""Coverage-guided fuzzing of every decoder that reads bytes of strangers."""

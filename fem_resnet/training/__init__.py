"""Algorithms that solve a `LearningProblem`."""

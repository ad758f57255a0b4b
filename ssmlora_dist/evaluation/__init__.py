"""Scores and how they are put together: pure functions of what a model answered."""

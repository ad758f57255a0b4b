"""Sweeps: many runs from one file, each in processes of its own, and what became of them side by side."""

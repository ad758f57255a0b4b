"""The training loop and everything around it: schedule, optimiser, evaluation, metrics, one whole run."""

"""Configuration: the schema of a run, loading with overrides, rules, and the launch scripts' arguments."""

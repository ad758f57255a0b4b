"""Adapters: configuration, layers, placement, the state through depth, injection and files."""

"""Tasks: generators of items, the same every time, out of a seed or out of records."""

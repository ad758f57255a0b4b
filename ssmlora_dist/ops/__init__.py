"""One time module as pure functions; `reference` is the truth that every faster path is tested against."""

"""Data that comes with lightlib: where fetched files come from, the tiny model, and how each was made."""

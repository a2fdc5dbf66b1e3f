"""Alembic's: one file in `versions/` per change of the tables."""

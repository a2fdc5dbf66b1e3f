"""Jobs make whole models too, and are let in by the memory that they take; batches are one server's each."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    """Add what an earlier version did not know: what was there are adapters."""
    op.add_column("jobs", sa.Column("memory", sa.BigInteger(), nullable=True))
    op.add_column("batches", sa.Column("holder", sa.BigInteger(), nullable=True))
    op.add_column("models", sa.Column("form", sa.Text(), nullable=False, server_default="adapter"))

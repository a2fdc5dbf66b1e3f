"""Explanations have a price."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    """Price lists of before have none for it."""
    op.add_column("prices", sa.Column("explanation", sa.BigInteger(), nullable=False, server_default="0"))

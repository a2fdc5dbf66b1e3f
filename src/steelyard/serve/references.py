"""Which artifacts are in use: contents are stored once within a project, whoever lists them."""

from __future__ import annotations

from sqlalchemy import Connection, select

from steelyard.store import tables


def unused(connection: Connection, project: str, artifacts: set[str]) -> set[str]:
    """Those of some artifacts that neither a file nor a model of the project has."""
    files, models = tables.files.c, tables.models.c
    listed = set(
        connection.execute(
            select(files.artifact).where(files.project_id == project, files.artifact.in_(artifacts))
        ).scalars()
    )
    for contents in connection.execute(select(models.contents).where(models.project_id == project)).scalars():
        listed.update(contents.values())
    return artifacts - listed

"""Models that jobs made: adapters of a served model, kept as artifacts, worn by the running engine. Knows no HTTP.

An adapter's files lie clear in `folder`, where the engine maps them; if they are not there they are written again from
the artifacts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from steelyard.atomic import folder_aside
from steelyard.checkpoint import manifest
from steelyard.errors import ConflictError, NotFoundError, SteelyardError
from steelyard.serve.models import ServedModel, adapter_model
from steelyard.serve.references import unused
from steelyard.store import tables
from steelyard.store.artifacts import Artifacts
from steelyard.store.database import Database

MOST_SLUG = 18

Row = dict[str, Any]
columns = tables.models.c
log = logging.getLogger("steelyard.models")


def slug(text: str) -> str:
    """A part of a model's name: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MOST_SLUG].strip("-")


def model_name(base: str, project: str, suffix: str | None, job_id: str) -> str:
    """`ft:BASE:PROJECT:SUFFIX:ID`, as OpenAI calls what a job made."""
    return f"ft:{base}:{slug(project) or 'project'}:{slug(suffix or '')}:{job_id[-10:]}"


class TunedModels:
    """Keeps the table of served models and the engines in step with what jobs made.

    Args:
        database: where they are listed.
        artifacts: where their files are.
        folder: where the files lie clear.
        served: the table of served models.
    """

    def __init__(self, database: Database, artifacts: Artifacts, folder: Path, served: dict[str, ServedModel]) -> None:
        self.database, self.artifacts, self.folder, self.served = database, artifacts, folder, served
        self._one_by_one = asyncio.Lock()

    def keep(
        self, project: str, base: str, name: str, source: Path, now: int, *, job_id: str, step: int | None = None
    ) -> Row:
        """Store an adapter's folder and list it; nothing is served yet."""
        contents = {path.name: self.artifacts.put_file(project, path).name for path in _files(source)}
        found = manifest.read(source)
        row: Row = {
            "id": name,
            "project_id": project,
            "base": base,
            "job_id": job_id,
            "step": step,
            "metrics": found.metrics,
            "checkpoint": found.id,
            "contents": contents,
            "created_at": now,
        }

        def add(connection: Connection) -> None:
            connection.execute(delete(tables.models).where(columns.id == name))  # a job that published before it died
            connection.execute(insert(tables.models), row)

        self.database.write_now(add)
        return row

    async def serve(self, row: Row) -> None:
        """Let requests of its project name it, from now on.

        Raises:
            SteelyardError: its files are damaged, its base is not served, or the engine refuses it.
        """
        base = self.served.get(row["base"])
        if base is None or base.adapter is not None:
            raise NotFoundError(f"the model '{row['base']}', which '{row['id']}' is an adapter of, is not served here")
        async with self._one_by_one:
            folder = await asyncio.to_thread(self._clear, row)
            made = await asyncio.to_thread(adapter_model, row["id"], folder, base, row["project_id"])
            await base.engine.load_adapter(row["id"], folder)
            self.served[row["id"]] = made

    async def serve_all(self) -> None:
        """Serve whatever is listed and not served: at the start, and what other servers have made."""
        rows = await self.database.read(lambda connection: connection.execute(select(tables.models)).mappings().all())
        for row in rows:
            base = self.served.get(row["base"])
            if row["id"] in self.served or base is None or base.engine.ready is None:
                continue
            try:
                await self.serve(dict(row))
            except SteelyardError as error:
                log.error("the model '%s' cannot be served: %s", row["id"], error)
        listed = {row["id"] for row in rows}
        for name, model in list(self.served.items()):
            if model.project is not None and name not in listed:
                await self._forget(name, model)

    async def remove(self, project: str, name: str) -> None:
        """Delete a model that a job made; requests that wear it run to their end.

        Raises:
            NotFoundError: the project has none of this name.
            ConflictError: it is no job's, so it is not the project's to delete.
        """
        if name in self.served and self.served[name].project is None:
            raise ConflictError(f"'{name}' is served to everybody: it is not this project's to delete", param="model")

        def drop(connection: Connection) -> dict[str, str]:
            row = connection.execute(
                select(columns.contents).where(columns.id == name, columns.project_id == project)
            ).first()
            if row is None:
                raise NotFoundError(f"no model '{name[:80]}' of this project", param="model", code="model_not_found")
            connection.execute(delete(tables.models).where(columns.id == name))
            contents: dict[str, str] = row.contents
            return contents

        contents = await self.database.write(drop)
        if name in self.served:
            await self._forget(name, self.served[name])
        await asyncio.to_thread(self._drop_contents, project, set(contents.values()))

    async def _forget(self, name: str, model: ServedModel) -> None:
        async with self._one_by_one:
            self.served.pop(name, None)
            with contextlib.suppress(SteelyardError):
                await model.engine.drop_adapter(name)

    def _drop_contents(self, project: str, names: set[str]) -> None:
        for name in self.database.read_now(lambda connection: unused(connection, project, names)):
            self.artifacts.delete(project, name)

    def _clear(self, row: Row) -> Path:
        """The adapter's folder, clear; written from the artifacts if it is not there, or not what it was."""
        folder = self.folder / hashlib.sha256(f"{row['project_id']} {row['id']}".encode()).hexdigest()[:32]
        if folder.is_dir():
            with contextlib.suppress(SteelyardError, OSError):
                files = {path.name: manifest.sha256_file(path) for path in manifest.model_files(folder)}
                if manifest.digest(files) == row["checkpoint"]:
                    return folder
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with folder_aside(folder) as aside:
            for name, artifact in row["contents"].items():
                with (aside / name).open("wb") as file:
                    for piece in self.artifacts.read(row["project_id"], artifact):
                        file.write(piece)
        return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())

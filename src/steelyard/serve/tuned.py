"""Models that jobs made, kept as artifacts: adapters, worn by a running engine, and whole models, each with its own.

Their files lie clear in `folder`, where engines map them; if they are not there they are written again from the
artifacts. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, delete, insert, select

from steelyard import memory
from steelyard.atomic import folder_aside
from steelyard.checkpoint import manifest
from steelyard.errors import ConflictError, EngineUnavailableError, ModelNotFoundError, NotFoundError, SteelyardError
from steelyard.serve.engine_client import EngineClient
from steelyard.serve.models import ServedModel, adapter_model, whole_model
from steelyard.serve.references import unused
from steelyard.store import tables
from steelyard.store.artifacts import Artifacts
from steelyard.store.database import Database

MOST_SLUG = 18
ENGINE_BYTES = 1_500_000_000
"""Of an engine process beside the weights: keys and values, and what computes."""
START_SECONDS = 120.0
"""How long a whole model's engine may take until it is ready."""
DRAIN_SECONDS = 30.0
"""How long requests of a model that is deleted may go on."""

Form = Literal["adapter", "model"]

Row = dict[str, Any]
columns = tables.models.c
log = logging.getLogger("steelyard.models")


def slug(text: str) -> str:
    """A part of a model's name: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MOST_SLUG].strip("-")


def model_name(kind: str, job: Row, project: str) -> str:
    """`ft:BASE:PROJECT:SUFFIX:ID`, as OpenAI calls what a job made.

    Args:
        kind: `ft`, or how a model is compressed.
        job: its row; a model that was itself made by a job gives its base, and its suffix where there is no other.
        project: its name.
    """
    made = job["model"].split(":")
    base, suffix = (made[1], made[3]) if len(made) > 4 else (job["model"], "")
    return f"{kind}:{base}:{slug(project) or 'project'}:{slug(job['suffix'] or suffix)}:{job['id'][-10:]}"


class TunedModels:
    """Keeps the table of served models and the engines in step with what jobs made.

    Args:
        database: where they are listed.
        artifacts: where their files are.
        folder: where the files lie clear.
        served: the table of served models.
        new_engine: makes the engine of a whole model, by its name and folder.
    """

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        folder: Path,
        served: dict[str, ServedModel],
        new_engine: Callable[[str, Path], EngineClient] = EngineClient,
    ) -> None:
        self.database, self.artifacts, self.folder, self.served = database, artifacts, folder, served
        self._new_engine = new_engine
        self._one_by_one = asyncio.Lock()
        self._complaints: dict[str, str] = {}
        """By model, why it could not be served the last time: said once."""

    def knows(self, project: str, model: str) -> bool:
        """Whether a model is served here, or comes from one that is; a name that nobody has is anybody's to refuse."""
        if self._is_base(model):
            return True
        row = self.database.read_now(lambda connection: _listed(connection, project, model))
        return self._is_base(row["base"]) if row is not None else ":" in model

    def checkpoint(self, project: str, model: str) -> Path:
        """The folder of a model that a project may name, clear.

        Raises:
            ModelNotFoundError: it is not served, and no job of the project made it.
        """
        if self._is_base(model):
            return self.served[model].engine.checkpoint
        row = self.database.read_now(lambda connection: _listed(connection, project, model))
        if row is None:
            raise ModelNotFoundError(f"the model '{model[:80]}' is not there any more", param="model")
        return self._clear(row)

    def project_name(self, project: str) -> str:
        """What a project is called."""
        named = tables.projects.c
        query = select(named.name).where(named.id == project)
        return self.database.read_now(lambda connection: connection.execute(query).scalar()) or project

    def keep(
        self,
        project: str,
        model: str,
        name: str,
        source: Path,
        now: int,
        *,
        job_id: str,
        form: Form,
        step: int | None = None,
    ) -> Row:
        """Store a checkpoint that was made from `model` and list it; nothing is served yet."""
        contents = {path.name: self.artifacts.put_file(project, path).name for path in _files(source)}
        found = manifest.read(source)
        listed = self.database.read_now(lambda connection: _listed(connection, project, model))
        row: Row = {
            "id": name,
            "project_id": project,
            "base": model if listed is None else listed["base"],
            "form": form,
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
            SteelyardError: its files are damaged, its base is not served, or no engine takes it.
        """
        base = self.served.get(row["base"])
        if base is None:
            raise NotFoundError(f"the model '{row['base']}', which '{row['id']}' was made from, is not served here")
        async with self._one_by_one:
            if row["id"] in self.served:
                return
            folder = await asyncio.to_thread(self._clear, row)
            if row["form"] == "adapter":
                made = await asyncio.to_thread(adapter_model, row["id"], folder, base, row["project_id"])
                await base.engine.load_adapter(row["id"], folder)
            else:
                made = await self._start(row, folder)
            self.served[row["id"]] = made

    async def _start(self, row: Row, folder: Path) -> ServedModel:
        """A whole model on an engine of its own."""
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if not memory.fits(weights + ENGINE_BYTES, (), memory.available()):
            raise EngineUnavailableError(f"there is no memory for the engine of '{row['id']}': delete a model")
        engine = self._new_engine(row["id"], folder)
        made = await asyncio.to_thread(whole_model, row["id"], engine, row["project_id"], row["base"])
        await engine.start()
        try:
            async with asyncio.timeout(START_SECONDS):
                await engine.wait_ready()
        except TimeoutError:
            await asyncio.shield(engine.stop())
            raise EngineUnavailableError(f"the engine of '{row['id']}' does not start: see the server's log") from None
        except BaseException:
            await asyncio.shield(engine.stop())
            raise
        return made

    async def serve_named(self, project: str, name: str) -> bool:
        """Serve a model of a project that another process has made; returns whether there is one.

        Raises:
            SteelyardError: as `serve` does.
        """
        row = await self.database.read(lambda connection: _listed(connection, project, name))
        if row is None:
            return False
        await self.serve(row)
        return True

    async def serve_all(self) -> None:
        """Serve whatever is listed and not served: at the start, and what other servers have made."""
        before = list(self.served.items())  # what is served from now on is none of those that are gone
        rows = await self.database.read(lambda connection: connection.execute(select(tables.models)).mappings().all())
        for row in rows:
            base = self.served.get(row["base"])
            if row["id"] in self.served or base is None or base.engine.ready is None:
                continue
            try:
                await self.serve(dict(row))
                self._complaints.pop(row["id"], None)
            except (SteelyardError, OSError) as error:
                if self._complaints.get(row["id"]) != str(error):
                    log.error("the model '%s' cannot be served: %s", row["id"], error)
                self._complaints[row["id"]] = str(error)
        listed = {row["id"] for row in rows}
        for name, model in before:
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
        await asyncio.to_thread(shutil.rmtree, self._place(project, name), True)
        await asyncio.to_thread(self._drop_contents, project, set(contents.values()))

    async def _forget(self, name: str, model: ServedModel) -> None:
        async with self._one_by_one:
            self.served.pop(name, None)
            if model.adapter is not None:
                with contextlib.suppress(SteelyardError):
                    await model.engine.drop_adapter(name)
        if model.adapter is None:
            await model.engine.drained(DRAIN_SECONDS)
            await model.engine.stop()
        template = model.template
        if template is not None and all(other.template is not template for other in self.served.values()):
            await asyncio.to_thread(template.close)

    def _drop_contents(self, project: str, names: set[str]) -> None:
        for name in self.database.read_now(lambda connection: unused(connection, project, names)):
            self.artifacts.delete(project, name)

    def _clear(self, row: Row) -> Path:
        """A made model's folder, clear; written from the artifacts if it is not there, or not what it was."""
        folder = self._place(row["project_id"], row["id"])
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

    def _place(self, project: str, name: str) -> Path:
        return self.folder / hashlib.sha256(f"{project} {name}".encode()).hexdigest()[:32]

    def _is_base(self, model: str) -> bool:
        return model in self.served and self.served[model].is_base


def _listed(connection: Connection, project: str, name: str) -> Row | None:
    row = connection.execute(select(tables.models).where(columns.id == name, columns.project_id == project))
    found = row.mappings().first()
    return None if found is None else dict(found)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())

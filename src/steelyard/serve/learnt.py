"""The rows that a tuned model learnt from, for the project whose they are: to be compared with what it is asked."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, select

from steelyard.data import chat, tokenize
from steelyard.data.rows import Conversation
from steelyard.errors import DataError, NotFoundError, RequestError, TemplateError
from steelyard.serve import files
from steelyard.serve.files import Files
from steelyard.serve.models import ServedModel
from steelyard.store import tables

MOST_ROWS = 256
"""That are compared; of more, as many at even distances."""
LONGEST = 512
"""Tokens of a row; what is longer is cut."""
TOLD = 400
"""Characters of a row that are told."""


class LearntRow(msgspec.Struct, frozen=True):
    """A row, and what of it is compared."""

    line: int
    text: str
    """What was said, in one line."""
    prompt: list[int]
    answer: list[int]


class Learnt(msgspec.Struct, frozen=True):
    """Rows of a training file."""

    file: str
    """Its id."""
    rows: list[LearntRow]


def learnt_rows(store: Files, served: ServedModel, project: str) -> Learnt:
    """The rows of the job that made a model. For a thread: it reads the database and a file.

    Raises:
        RequestError: it was made by no job on chats of this project, or its file is gone.
    """
    found = store.database.read_now(lambda connection: _file_of(connection, served.id, project))
    if found is None or served.template is None:
        reason = f"'{served.id}' was not tuned here on chats of this project: what it learnt from is not known"
        raise RequestError(reason, param="nearest")
    file_id, artifact = found
    try:
        with store.clear(project, artifact, "rows.jsonl") as path:
            conversations = [(number, row) for number, row in enumerate(chat.iterate(path), 1)]
    except DataError as error:
        raise RequestError(f"the rows of '{served.id}' cannot be compared: {error.reason}", param="nearest") from None
    chosen = _some(conversations)
    try:
        tokens = tokenize.of_chats([row for _, row in chosen], served.tokenizer, served.template, LONGEST, "truncate")
    except (DataError, TemplateError) as error:
        raise RequestError(f"the rows of '{served.id}' cannot be compared: {error}", param="nearest") from None
    made = []
    for (number, row), read in zip(chosen, tokens, strict=True):
        if read is not None:
            said = " / ".join(f"{message.role}: {message.content}" for message in row.messages)
            made.append(LearntRow(row.line or number, " ".join(said.split())[:TOLD], *read.last_answer))
    return Learnt(file_id, made)


def _file_of(connection: Connection, model: str, project: str) -> tuple[str, str] | None:
    """The training file of a model's job, and where it is; None: there is none."""
    models, jobs = tables.models.c, tables.jobs.c
    asked = select(jobs.training_file).where(
        models.id == model, models.project_id == project, models.job_id == jobs.id, jobs.kind == "fine_tuning"
    )
    file_id = connection.execute(asked).scalar()
    if file_id is None:
        return None
    try:
        return file_id, files.get(connection, project, file_id)["artifact"]
    except NotFoundError:
        reason = f"the file '{file_id}' that '{model}' learnt from is gone: there is nothing to compare"
        raise RequestError(reason, param="nearest") from None


def _some(rows: Sequence[tuple[int, Conversation]]) -> list[tuple[int, Conversation]]:
    if len(rows) <= MOST_ROWS:
        return list(rows)
    return [rows[number * len(rows) // MOST_ROWS] for number in range(MOST_ROWS)]

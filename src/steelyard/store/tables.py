"""The tables. Money is integer nano-dollars, moments are Unix seconds, ids are text with a prefix that says of what.

Migrations (`migrations/`) make these tables; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    Column("monthly_limit", BigInteger),  # nano-dollars; null: none
)

service_accounts = Table(
    "service_accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("service_accounts_by_project", "project_id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id")),  # null: an admin key
    Column("service_account_id", Text, ForeignKey("service_accounts.id")),
    Column("name", Text, nullable=False),
    Column("mac", LargeBinary(32), nullable=False, unique=True),  # HMAC-SHA256 of the key under the server's pepper
    Column("redacted", Text, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("last_used_at", BigInteger),
    Index("api_keys_by_project", "project_id"),
)

rate_limits = Table(
    "rate_limits",
    metadata,
    Column("project_id", Text, ForeignKey("projects.id"), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("requests_per_minute", BigInteger, nullable=False),
    Column("tokens_per_minute", BigInteger, nullable=False),
    Column("concurrency", BigInteger, nullable=False),
)

spend_alerts = Table(
    "spend_alerts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("threshold", BigInteger, nullable=False),  # nano-dollars a month
    Column("recipients", JSON, nullable=False),
    Column("subject_prefix", Text),
    Column("sounded", Text),  # the last month in which it was
    Index("spend_alerts_by_project", "project_id"),
)

project_keys = Table(  # of artifacts; wrapped by the server's root key
    "project_keys",
    metadata,
    Column("project_id", Text, primary_key=True),
    Column("wrapped", LargeBinary(60), nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("artifact", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Index("files_by_project", "project_id", "created_at"),
    Index("files_by_artifact", "project_id", "artifact"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),  # fine_tuning, compression
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("training_file", Text),
    Column("validation_file", Text),
    Column("settings", JSON, nullable=False),  # hyperparameters and method, as asked
    Column("resolved", JSON, nullable=False),  # what `auto` became
    Column("seed", BigInteger, nullable=False),
    Column("suffix", Text),
    Column("metadata", JSON),
    Column("status", Text, nullable=False),
    Column("error", JSON),
    Column("result_model", Text),
    Column("result_files", JSON, nullable=False),
    Column("tokens", BigInteger),  # that the whole run will take
    Column("trained_tokens", BigInteger, nullable=False),
    Column("memory", BigInteger),  # bytes that its run takes, by estimate; null: not checked yet
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger),
    Column("holder", BigInteger),  # the process that works on it
    Index("jobs_by_project", "project_id", "created_at"),
    Index("jobs_by_status", "status", "created_at"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job_id", Text, ForeignKey("jobs.id"), nullable=False),
    Column("number", BigInteger, nullable=False),  # within the job
    Column("created_at", BigInteger, nullable=False),
    Column("level", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON),
    UniqueConstraint("job_id", "number", name="job_events_in_order"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("key_id", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("errors", JSON, nullable=False),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("model", Text),
    Column("total", BigInteger, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("metadata", JSON),
    Column("moments", JSON, nullable=False),  # when it reached each status
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("holder", BigInteger),  # the server that works on it
    Index("batches_by_project", "project_id", "created_at"),
    Index("batches_by_status", "status", "created_at"),
)

batch_lines = Table(  # answers of batches that are under way; sealed by the project's key
    "batch_lines",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("failed", Boolean, nullable=False),
    Column("content", LargeBinary, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("model", Text, nullable=False),
    Column("canary", Text),
    Column("percent", BigInteger, nullable=False),  # of those who ask, who get the canary
    Column("history", JSON, nullable=False),  # what it stood for before, the latest last
    Column("created_at", BigInteger, nullable=False),
)

shutdowns = Table(
    "shutdowns",
    metadata,
    Column("model", Text, primary_key=True),
    Column("at", BigInteger, nullable=False),
)

stored_completions = Table(
    "stored_completions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("model", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("metadata", JSON),
    Column("content", LargeBinary, nullable=False),  # sealed by the project's key
    Index("stored_by_project", "project_id", "created_at"),
)

responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("previous", Text),  # the response that it goes on from
    Column("created_at", BigInteger, nullable=False),
    Column("content", LargeBinary, nullable=False),  # sealed by the project's key
    Index("responses_by_time", "created_at"),
)

models = Table(  # what jobs made
    "models",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("base", Text, nullable=False),  # the served model that it comes from
    Column(
        "form", Text, nullable=False, server_default="adapter"
    ),  # of the base; or `model`, with an engine of its own
    Column("job_id", Text),
    Column("step", BigInteger),  # null: the job's result; else a checkpoint's
    Column("metrics", JSON, nullable=False),
    Column("checkpoint", Text, nullable=False),  # its digest
    Column("contents", JSON, nullable=False),  # artifacts by file name
    Column("created_at", BigInteger, nullable=False),
    Index("models_by_project", "project_id", "created_at"),
    Index("models_by_job", "job_id"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", Text, primary_key=True),  # a project, or `administration`
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("holder", BigInteger, nullable=False),  # the server that does it
    Column("answer", LargeBinary),  # sealed; null while it is being done
    Index("idempotency_by_time", "created_at"),
)

prices = Table(  # a version is the whole list: never changed, only followed by the next
    "prices",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("model", Text, primary_key=True),  # "*": every model that is not named
    Column("input", BigInteger, nullable=False),  # nano-dollars a token
    Column("cached_input", BigInteger, nullable=False),
    Column("output", BigInteger, nullable=False),
    Column("training", BigInteger, nullable=False),
    Column("storage", BigInteger, nullable=False),  # nano-dollars a GB and day
    Column("explanation", BigInteger, nullable=False, server_default="0"),
    Column("created_at", BigInteger, nullable=False),
)

reservations = Table(  # open ones; a settled one is deleted in the transaction that writes its entry
    "reservations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("holder", BigInteger, nullable=False),  # the server that settles it
    Column("project_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("service", Text, nullable=False),
    Column("batch", Boolean, nullable=False),
    Column("price_version", BigInteger, nullable=False),
    Column("price", JSON, nullable=False),
    Column("month", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),  # counted so far, as last persisted
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("training_tokens", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("reservations_by_holder", "holder"),
)

ledger = Table(  # only ever added to; the sum of a project's amounts is what it has spent and holds reserved
    "ledger",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),  # reserve, settle, training, storage, credit
    Column("reference", Text, nullable=False),  # the reservation, the job, the day
    Column("project_id", Text, nullable=False),
    Column("key_id", Text),
    Column("model", Text, nullable=False),
    Column("service", Text, nullable=False),  # completions, embeddings, fine_tuning, ...
    Column("batch", Boolean, nullable=False),
    Column("month", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),  # nano-dollars
    Column("cost", BigInteger, nullable=False),  # what is charged: 0 of a reserve
    Column("price_version", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("training_tokens", BigInteger, nullable=False),
    Column("note", Text, nullable=False),
    Column("mac", LargeBinary(32), nullable=False),
    UniqueConstraint("kind", "reference", name="ledger_once"),
    Index("ledger_by_project", "project_id", "sequence"),
    Index("ledger_by_time", "at"),
)

balances = Table(  # by month, kept in the transaction that adds to the ledger
    "balances",
    metadata,
    Column("project_id", Text, primary_key=True),
    Column("month", Text, primary_key=True),
    Column("amount", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("event", Text, nullable=False),
    Column("actor", Text, nullable=False),  # a key's id, or `cli`
    Column("project_id", Text),
    Column("target", Text, nullable=False),
    Column("detail", JSON, nullable=False),
    Column("mac", LargeBinary(32), nullable=False),
)

chains = Table(  # the head of each hash chain; its row is what writers of several servers wait for
    "chains",
    metadata,
    Column("name", Text, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("mac", LargeBinary(32), nullable=False),
)

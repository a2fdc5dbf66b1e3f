"""The command line: one verb per file, in lifecycle order. Errors become one line and an exit code here, once."""

from __future__ import annotations

import importlib
import io
import json
import keyword
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.main import get_command

from steelyard import __version__
from steelyard.errors import BUG, ConfigError, SteelyardError, edge

MAX_MESSAGE = 2000  # characters

LIFECYCLE = (
    "pull",
    "data",
    "train",
    "search",
    "merge",
    "compress",
    "export",
    "evaluate",
    "predict",
    "explain",
    "generate",
    "serve",
    "worker",
    "demo",
)
ADMINISTRATION = ("projects", "keys", "budgets", "prices", "usage", "ledger", "secrets")
MIGRATION = ("import",)
VERBS = LIFECYCLE + ADMINISTRATION + MIGRATION


def build(verbs: Sequence[str] = VERBS) -> typer.Typer:
    """The command line with some of its verbs: each imports what it needs, which for most is torch."""
    app = typer.Typer(
        name="steelyard",
        help="AI models as a service, self-hosted: data -> train -> compress -> evaluate -> serve.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in verbs:
        verb = importlib.import_module(f"steelyard.cli.{name}{'_' if keyword.iskeyword(name) else ''}")
        if isinstance(getattr(verb, "app", None), typer.Typer):
            app.add_typer(verb.app, name=name)
        else:
            app.command(name=name, help=verb.HELP)(verb.command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steelyard {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code of `errors.EDGES`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or a text that the terminal cannot show
    try:
        verb = next((argument for argument in arguments if not argument.startswith("-")), "")
        code = get_command(build([verb] if verb in VERBS else VERBS)).main(
            args=arguments, prog_name="steelyard", standalone_mode=False
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help
            error.show()  # type: ignore[attr-defined]
            sys.exit(edge(ConfigError()).exit_code)
        if type(error).__name__ == "Abort":
            sys.exit(130)
        complaint = _complaint(error)
        if complaint is None:
            traceback.print_exc()
            print("error: this is a bug of Steelyard's; please report it with the lines above", file=sys.stderr)
            sys.exit(BUG.exit_code)
        _complain(complaint, arguments)
        sys.exit(edge(complaint).exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _complaint(error: Exception) -> SteelyardError | None:
    """What to tell the user; None for a bug of our own."""
    if isinstance(error, SteelyardError):
        return error
    if isinstance(error, OSError) and error.strerror:  # a path that cannot be written, a full disk
        if not error.filename:
            return SteelyardError(f"the system refuses: {error.strerror}")
        return ConfigError(f"cannot use '{error.filename}': {error.strerror}; choose another path")
    if hasattr(error, "format_message"):  # typer vendors click's usage errors
        context = getattr(error, "ctx", None)
        verb = context.command_path if context is not None else "steelyard"
        return ConfigError(f"{error.format_message().rstrip('.')}; see `{verb} --help`")
    return None


def _complain(error: SteelyardError, arguments: list[str]) -> None:
    # One line that a terminal can be trusted with, whatever somebody's file put into it.
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(str(error).split()))
    half = MAX_MESSAGE // 2  # what somebody wrote may be long; what is wrong with it stands at the end
    message = shown if len(shown) <= MAX_MESSAGE else f"{shown[:half]} ... {shown[-half:]}"
    print(f"error: {message}", file=sys.stderr)
    if "--json" in arguments:
        code = getattr(error, "code", None) or edge(error).code
        print(json.dumps({"error": {"message": message, "type": type(error).__name__, "code": code}}))

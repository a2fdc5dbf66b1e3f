"""The command line: one verb per file, in lifecycle order. Errors become one line and an exit code here, once."""

from __future__ import annotations

import json
import sys
import traceback

import typer
from typer.main import get_command

from steelyard import __version__
from steelyard.cli import compress, data, demo, evaluate, generate, predict, pull, serve, train
from steelyard.errors import BUG, SteelyardError, edge

app = typer.Typer(
    name="steelyard",
    help="AI models as a service, self-hosted: data -> train -> compress -> evaluate -> serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (pull, data, train, compress, evaluate, predict, generate, serve, demo):
    name = verb.__name__.rpartition(".")[2]
    if verb is compress:
        app.add_typer(compress.app, name=name)
    else:
        app.command(name=name, help=verb.HELP)(verb.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steelyard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code of `errors.EDGES`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = get_command(app).main(args=arguments, prog_name="steelyard", standalone_mode=False)
    except SteelyardError as error:
        _complain(error, arguments)
        sys.exit(edge(error).exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Typer vendors click's usage errors: they know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(int(error.exit_code))
        if type(error).__name__ == "Abort":
            sys.exit(130)
        traceback.print_exc()
        print("error: this is a bug of Steelyard's; please report it with the lines above", file=sys.stderr)
        sys.exit(BUG.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(error: SteelyardError, arguments: list[str]) -> None:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr)
    if "--json" in arguments:
        kind = edge(error)
        print(json.dumps({"error": {"message": message, "type": type(error).__name__, "code": kind.code}}))

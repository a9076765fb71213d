"""The `lightpress` command: the verbs joined, and every error turned into one sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from cli.bench import bench
from cli.check_ascend import check_ascend
from cli.compare import compare
from cli.compress import compress
from cli.console import RunFailure
from cli.demo import demo
from cli.distill import distill_data
from cli.distributed import leave_to_first
from cli.evaluate import evaluate
from cli.export import export
from cli.generate import generate
from cli.inspect import inspect
from cli.options import PANELS
from cli.plan import plan
from cli.profiles import app as profiles
from cli.recover import recover
from cli.version import read_version
from compress.errors import UserError

FAILED, MISUSED = 1, 2
STOPPED = "stopped; nothing was kept"


class Verbs(TyperGroup):
    """The group of verbs, which never lets an expected error out as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; an interrupt says what is left of the run."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise RunFailure(str(stop) or STOPPED) from stop

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line and exit with 0, 1 (the run failed) or 2 (the user's input)."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except Exception as error:
            message, code = explain_error(error)
            if not code:
                raise
            if is_usage(error):
                leave_to_first()
            if message:
                print(f"lightpress: {message}", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)


class Verb(TyperCommand):
    """A verb whose help lists its flags under headings, without the rich library that typer's panels need."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and flags of each heading, in the order of PANELS."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for item in self.get_params(ctx):
            record = item.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if item.param_type_name == "argument" else "Options"
                headings.setdefault(getattr(item, "rich_help_panel", None) or kind, []).append(record)
        for heading in sorted(headings, key=PANELS.index):
            with formatter.section(heading):
                formatter.write_dl(headings[heading])


def explain_error(error: Exception) -> tuple[str, int]:
    """Return the sentence and the exit code for an error, and the code 0 for one that nobody expected."""
    if isinstance(error, UserError):
        return str(error), MISUSED
    if isinstance(error, RunFailure):
        return str(error), FAILED
    if isinstance(error, BrokenPipeError):
        return "", FAILED
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or type(error).__name__}; check the disk and its permissions.", FAILED
    # torch reports a failed allocation as a plain RuntimeError.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; use fewer --windows, or a machine with more.", FAILED
    return explain_usage(error)


def explain_usage(error: Any) -> tuple[str, int]:
    """Return the sentence for a mistake on the command line: typer's releases differ in where its classes live."""
    if not is_usage(error):
        return "", 0
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    return f"{error.format_message().rstrip('.')}{hint}.", MISUSED


def is_usage(error: Exception) -> bool:
    """Return whether it is a mistake on the command line, which all processes of a torchrun run find alike."""
    return hasattr(error, "format_message")


app = typer.Typer(
    name="lightpress",
    cls=Verbs,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is quick to import and to read in a log
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        print(f"lightpress {read_version()}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress a language-model checkpoint for the hardware that will run it, and prove the result."""
    if context.invoked_subcommand is None:
        print(context.get_help())


VERBS: Mapping[str, Any] = {
    "compress": compress,
    "plan": plan,
    "inspect": inspect,
    "recover": recover,
    "distill-data": distill_data,
    "export": export,
    "check-ascend": check_ascend,
    "generate": generate,
    "evaluate": evaluate,
    "bench": bench,
    "compare": compare,
    "demo": demo,
}
for name, verb in VERBS.items():
    app.command(name, cls=Verb)(verb)
for command in profiles.registered_commands:
    command.cls = Verb
app.add_typer(profiles, name="profiles")


def stop_run(number: int, frame: FrameType | None) -> None:
    """Leave as an interrupt does, so that unfinished output is removed."""
    raise KeyboardInterrupt


def main() -> None:
    """Run the console script."""
    signal.signal(signal.SIGTERM, stop_run)
    try:
        app(prog_name="lightpress")
    except SystemExit as stop:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # A process was once aborted by its network threads after all was done: they need not be ended.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 0)
        raise


if __name__ == "__main__":
    main()

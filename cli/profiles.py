"""`lightpress profiles`: the devices that a model can be planned for, and where their numbers come from."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.console import Console, align_table

if TYPE_CHECKING:
    from profiles.loader import Listed
    from profiles.profile import Profile

WIDTH = 100
HEAD = ("name", "kind", "peak", "bandwidth", "memory", "runtime", "origin")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a profile, or path of a .toml file.")]


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """List and show device profiles: peaks, memory, fixed costs, shape rules and formats."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
def list_all(*, as_json: options.AsJson = False, quiet: options.Quiet = False) -> None:
    """List all profiles; your own go before the package's of the same name.

    Example: lightpress profiles list
    """
    with Console(as_json, quiet) as console:
        from profiles.loader import list_profiles, user_folder

        rows = mark_hidden([describe_listed(listed, console) for listed in list_profiles()])
        console.show(align_table([HEAD, *(tuple(outline_row(row)) for row in rows)]))
        console.note(f"Your own profiles belong into {user_folder()}.")
        console.finish({"profiles": rows, "folder": str(user_folder())})


@app.command("show")
def show(name: Name, *, as_json: options.AsJson = False, quiet: options.Quiet = False) -> None:
    """Show every field of a profile with its unit and its source.

    Example: lightpress profiles show ascend-910b2
    """
    with Console(as_json, quiet) as console:
        from profiles.loader import find_profile, read_profile

        listed = find_profile(name)
        facts = describe_profile(read_profile(listed.path), listed)
        console.show(render_profile(facts))
        console.finish(facts)


def describe_listed(listed: Listed, console: Console) -> dict[str, Any]:
    """Return the main facts about one profile; a file that cannot be read is warned of, and says so itself."""
    from compress.errors import UserError
    from profiles.loader import read_profile

    place = {"name": listed.name, "path": str(listed.path), "origin": listed.origin}
    try:
        profile = read_profile(listed.path)
    except UserError as error:
        console.warn(str(error))
        return {**place, "error": str(error)}
    first = profile.formats.activations[0]
    return {
        **place,
        "description": profile.description,
        "kind": profile.kind,
        "type": first,
        "matrix_tflops": profile.compute.matrix_tflops[first],
        "bandwidth_gb_per_s": profile.memory.bandwidth_gb_per_s,
        "capacity_gib": profile.memory.capacity_gib,
        "runtime": profile.runtime.name,
    }


def mark_hidden(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with `hidden` on those whose name an earlier one has taken."""
    seen: set[str] = set()
    marked = []
    for row in rows:
        marked.append({**row, "hidden": row["name"] in seen})
        seen.add(row["name"])
    return marked


def outline_row(row: dict[str, Any]) -> list[str]:
    """Return one line of the list as cells."""
    origin = row["origin"] + (", hidden by yours" if row["hidden"] else "")
    if "error" in row:
        return [row["name"], "cannot be read", "", "", "", "", origin]
    return [
        row["name"],
        row["kind"],
        f"{row['matrix_tflops']:g} TFLOPS {row['type']}",
        f"{row['bandwidth_gb_per_s']:g} GB/s",
        f"{row['capacity_gib']:g} GiB",
        row["runtime"],
        origin,
    ]


def describe_profile(profile: Profile, listed: Listed) -> dict[str, Any]:
    """Return every field of a profile as plain data."""
    from profiles.loader import find_source, find_unit, list_fields

    return {
        "name": profile.name,
        "description": profile.description,
        "kind": profile.kind,
        "path": str(listed.path),
        "origin": listed.origin,
        "fields": [
            {
                "key": key,
                "value": list(value) if isinstance(value, tuple) else value,
                "unit": find_unit(key),
                "source": find_source(profile, key),
            }
            for key, value in list_fields(profile)
        ],
    }


def render_profile(facts: dict[str, Any]) -> str:
    """Return a profile as a table whose last column numbers the sources below it."""
    sources = list(dict.fromkeys(row["source"] for row in facts["fields"] if row["source"]))
    rows = [("", "value", "unit", "source")]
    for row in facts["fields"]:
        number = f"[{sources.index(row['source']) + 1}]" if row["source"] else ""
        rows.append((row["key"], show_value(row["value"]), row["unit"].partition(" (")[0], number))
    notes = [
        textwrap.fill(f"[{number}] {text}", WIDTH, subsequent_indent=" " * (len(str(number)) + 3))
        for number, text in enumerate(sources, 1)
    ]
    head = [f"{facts['name']} ({facts['kind']}): {facts['description']}", facts["path"]]
    return "\n".join([*head, "", align_table(rows), "", *notes])


def show_value(value: Any) -> str:
    """Return a value as text: yes or no, a list with commas, a number without needless digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


@app.command("measure")
def measure(
    *,
    name: Annotated[str, typer.Option("--name", help="Name of the profile.")] = "this-machine",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; else the folder of your own profiles.")
    ] = None,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure this machine with ONNX Runtime and write its profile; takes about half a minute.

    Example: lightpress profiles measure
    """
    with Console(as_json, quiet) as console:
        from cli.machine import run_measure

        run_measure(name, output, threads, overwrite, console)

"""`lightpress export`: a checkpoint as what a runtime loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import Console, format_bytes
from compress.errors import UserError

TARGETS = ("onnx",)


def export(
    *,
    source: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    target: Annotated[str, typer.Option("--target", help=f"One of: {', '.join(TARGETS)}.")] = TARGETS[0],
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Export a checkpoint for a runtime: onnx writes model.onnx with its data and the tokenizer files.

    Example: lightpress export ./model --target onnx -o ./model/onnx
    """
    if target not in TARGETS:
        raise UserError(f"--target {target} is not one of {', '.join(TARGETS)}.")
    with Console(as_json, quiet) as console:
        from backends.export_onnx import export_onnx
        from cli.prepare import check_weights
        from compress.checkpoint import open_checkpoint

        check_folder(output, Path(source), overwrite)
        checkpoint = open_checkpoint(source)
        check_weights(checkpoint, console)
        graph = export_onnx(checkpoint, output, lambda *steps: console.progress("export", *steps))
        sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir()) if path.is_file()}
        console.show(f"{graph} written: {len(sizes)} files, {format_bytes(sum(sizes.values()))}.")
        console.finish({"graph": str(graph), "files": sizes})


def check_folder(output: Path, source: Path, overwrite: bool) -> None:
    """Raise UserError unless the folder is free; the checkpoint's own `onnx` folder is a fine place."""
    if output.resolve() == source.resolve():
        raise UserError(f"The output {output} is the input folder; choose another, such as {output / 'onnx'}.")
    if output.exists() and not output.is_dir():
        raise UserError(f"The output {output} is a file; choose a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"The output {output} exists and is not empty; choose another folder or add --overwrite.")

"""`lightpress export`: a checkpoint as what a runtime loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import Console, format_bytes
from compress.errors import UserError

TARGETS = ("onnx", "uniform")


def export(
    *,
    source: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    target: Annotated[str, typer.Option("--target", help=f"One of: {', '.join(TARGETS)}.")] = TARGETS[0],
    weights: Annotated[
        str, typer.Option("--format", help="Weights of the graph: fp32, int8 or int4 (embedding and head then int8).")
    ] = "fp32",
    method: Annotated[
        str,
        typer.Option("--method", help="How weights are rounded: gptq (with text), search (no text) or nearest."),
    ] = "gptq",
    block: Annotated[int, typer.Option("--block", help="Inputs that share a scale: 32, 64 or 128.")] = 32,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Whether blocks have no zero point of their own.")
    ] = False,
    standard: Annotated[
        bool, typer.Option("--standard-ops", help="Only operators of the ONNX standard, for other runtimes.")
    ] = False,
    text: Annotated[Path | None, typer.Option("--text", help="Text that GPTQ learns from; else sampled.")] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of that text.")] = 64,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Export a checkpoint for a runtime: onnx writes model.onnx with its data and the tokenizer files; uniform writes
    an equal Hugging Face folder whose layers are zero-padded to one shape, so that stock code opens an uneven model.

    Example: lightpress export ./model --target onnx -o ./model/onnx
    """
    if target not in TARGETS:
        raise UserError(f"--target {target} is not one of {', '.join(TARGETS)}.")
    with Console(as_json, quiet) as console:
        from backends.export_onnx import export_onnx
        from cli.prepare import check_weights
        from cli.weights import FormatFlags, open_form
        from compress.checkpoint import open_checkpoint

        if target == "uniform":
            export_uniform(source, output, overwrite, console)
            return
        flags = FormatFlags(weights, method, block, symmetric, standard, text, windows)
        check_folder(output, Path(source), overwrite)
        checkpoint = open_checkpoint(source)
        check_weights(checkpoint, console)
        with open_form(flags, checkpoint, console) as form:
            graph = export_onnx(checkpoint, output, lambda *steps: console.progress("export", *steps), form)
        sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir()) if path.is_file()}
        console.show(f"{graph} written: {len(sizes)} files, {format_bytes(sum(sizes.values()))}.")
        console.finish({"graph": str(graph), "files": sizes})


def export_uniform(source: str, output: Path, overwrite: bool, console: Console) -> None:
    """Write the zero-padded uniform copy of a checkpoint."""
    from cli.prepare import check_weights
    from compress.checkpoint import open_checkpoint
    from compress.checkpoint_writer import CheckpointWriter, check_output
    from compress.surgery.pad import uniform_config, write_padded
    from compress.weights import read_spec

    checkpoint = open_checkpoint(source)
    spec = read_spec(checkpoint)
    config = uniform_config(spec)
    check_output(output, checkpoint.folder, overwrite)
    check_weights(checkpoint, console)
    with CheckpointWriter(output, config, overwrite=overwrite, source=checkpoint.folder) as writer:
        write_padded(checkpoint, spec, writer)
        for path in checkpoint.side_files():
            writer.add_file(path)
        writer.finish()
    console.show(f"{output} written: every layer padded with zeros to the shape of the widest.")
    console.finish({"folder": str(output), "config": config})


def check_folder(output: Path, source: Path, overwrite: bool) -> None:
    """Raise UserError unless the folder is free; the checkpoint's own `onnx` folder is a fine place."""
    if output.resolve() == source.resolve():
        raise UserError(f"The output {output} is the input folder; choose another, such as {output / 'onnx'}.")
    if output.exists() and not output.is_dir():
        raise UserError(f"The output {output} is a file; choose a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"The output {output} exists and is not empty; choose another folder or add --overwrite.")

"""`lightpress export`: a checkpoint as what a runtime loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli import export_flags as flags
from cli import options
from cli.console import Console, format_bytes
from compress.errors import UserError

if TYPE_CHECKING:
    from backends.export_onnx import GraphForm


def export(
    *,
    context: typer.Context,
    source: options.Source,
    output: flags.Output,
    target: flags.Target = None,
    profile: flags.Profile = None,
    format: flags.Format = None,  # noqa: A002 (the flag's name)
    method: flags.Method = "gptq",
    block: flags.Block = None,
    symmetric: flags.Symmetric = None,
    ends: flags.Ends = "auto",
    standard: flags.StandardOps = False,
    text: flags.Text = None,
    windows: flags.Windows = 64,
    smooth: flags.Smooth = 0.5,
    mixed: flags.Mixed = True,
    int8_head: flags.Int8Head = False,
    soc_version: flags.SocVersion = "",
    dtype: flags.Dtype = "",
    devices: flags.Devices = 1,
    cache: flags.Cache = None,
    gears: flags.Gears = "",
    static: flags.Static = False,
    ids: flags.Ids = "int64",
    logits: flags.LogitsOf = "last",
    precision: flags.Precision = "",
    external_weight: flags.ExternalWeight = None,
    host_cpu: flags.HostCpu = None,
    jobs: flags.Jobs = 4,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Export a checkpoint for a runtime.

    onnx: a graph for ONNX Runtime. uniform: an equal Hugging Face folder whose layers are zero-padded to one shape, so
    that stock code opens an uneven model. ascend-om: a graph, script and runner for ATC. ascend-hf: a Hugging Face
    folder for vllm-ascend and MindIE, quantised or not.

    Example: lightpress export ./model --target onnx -o ./model/onnx
    """
    asked = dict(context.params)
    with Console(as_json, quiet) as console:
        chosen = choose_target(target, profile)
        flags.refuse_idle(context, chosen)
        WRITERS[chosen](source, output, asked, console)


def choose_target(target: str | None, profile: str | None) -> str:
    """Return the target that was asked for, else the profile's, else onnx; UserError for one that is not there."""
    if target not in (None, *flags.TARGETS):
        raise UserError(f"--target {target} is not one of {', '.join(flags.TARGETS)}.")
    if profile is None:
        return target or flags.ONNX
    from profiles.loader import load_profile

    if target == flags.UNIFORM:
        raise UserError(f"--profile {profile} means nothing to --target {target}; leave one of them out.")
    own = load_profile(profile).runtime.export
    if target == flags.ONNX != own:
        raise UserError(f"--target {target}: {profile} runs {own}; leave one of them out, or name a CPU profile.")
    return target or own


def write_onnx(source: str, output: Path, asked: dict[str, Any], console: Console) -> None:
    """Write a graph for ONNX Runtime."""
    from backends.export_onnx import export_onnx
    from cli.prepare import check_tokenizer, check_weights, check_writable
    from cli.weights import FormatFlags, choose_format, open_form
    from compress.checkpoint import open_checkpoint
    from compress.weights import read_spec

    check_folder(output, Path(source), asked["overwrite"])
    check_writable(output)
    checkpoint = open_checkpoint(source)
    check_tokenizer(checkpoint.folder, console)
    name, profile = asked["format"], asked["profile"]
    if profile is not None:
        name = name or choose_format(profile, read_spec(checkpoint).shape, asked["standard"], console)
        check_format(name, profile)
    own = {key: asked[key] for key in ("method", "block", "symmetric", "standard", "text", "windows", "ends")}
    form_flags = FormatFlags(name or "fp32", **own)
    check_weights(checkpoint, console)
    with open_form(form_flags, checkpoint, console) as form:
        graph = export_onnx(checkpoint, output, lambda *steps: console.progress("export", *steps), form)
        weights = describe_weights(form_flags.name, form)
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir()) if path.is_file()}
    console.show(f"{graph} written: {len(sizes)} files, {format_bytes(sum(sizes.values()))}.")
    console.finish({"graph": str(graph), "files": sizes, "weights": weights})


def check_format(name: str, profile: str) -> None:
    """Raise UserError for a format that the profile's runtime does not read."""
    from cli.weights import list_formats
    from profiles.loader import load_profile

    known = list_formats(load_profile(profile))
    if name not in known:
        raise UserError(f"--format {name}: {profile} reads {', '.join(known)}; give one of these, or no --profile.")


def describe_weights(name: str, form: GraphForm) -> dict[str, Any]:
    """Return the format of a graph's weights as plain data, with what decided on embedding and head."""
    from compress.report import make_plain

    own, choice = (getattr(form.quantiser, key, None) for key in ("form", "choice"))
    settings = {key: getattr(own, key) for key in ("method", "block", "symmetric") if hasattr(own, key)}
    return {"format": name, **settings, **({"ends": make_plain(choice)} if choice is not None else {})}


def write_uniform(source: str, output: Path, asked: dict[str, Any], console: Console) -> None:
    """Write the zero-padded uniform copy of a checkpoint."""
    from cli.prepare import check_weights
    from compress.checkpoint import open_checkpoint
    from compress.checkpoint_writer import CheckpointWriter, check_output
    from compress.surgery.pad import uniform_config, write_padded
    from compress.weights import read_spec

    checkpoint = open_checkpoint(source)
    spec = read_spec(checkpoint)
    config = uniform_config(spec)
    check_output(output, checkpoint.folder, asked["overwrite"])
    check_weights(checkpoint, console)
    with CheckpointWriter(output, config, overwrite=asked["overwrite"], source=checkpoint.folder) as writer:
        write_padded(checkpoint, spec, writer)
        for path in checkpoint.side_files():
            writer.add_file(path)
        writer.finish()
    console.show(f"{output} written: every layer padded with zeros to the shape of the widest.")
    console.finish({"folder": str(output), "config": config})


def write_om(source: str, output: Path, asked: dict[str, Any], console: Console) -> None:
    """Write what ATC compiles."""
    from cli.ascend_om import OmFlags, run_om_export

    names = (
        "soc_version", "cache", "gears", "static", "ids", "logits", "precision", "external_weight", "host_cpu", "jobs",
        "overwrite",
    )  # fmt: skip
    own = {key: asked[key] for key in names}
    run_om_export(source, output, OmFlags(asked["profile"] or "", dtype=asked["format"] or "fp16", **own), console)


def write_hf(source: str, output: Path, asked: dict[str, Any], console: Console) -> None:
    """Write a folder for Ascend's model servers."""
    from cli.ascend_hf import HfFlags, export_ascend_hf

    names = ("soc_version", "dtype", "devices", "smooth", "mixed", "int8_head", "text", "windows")
    own = {key: asked[key] for key in names}
    if asked["method"] not in HF_METHODS:
        raise UserError(f"--method {asked['method']} is not for --target {flags.HF}; give {' or '.join(HF_METHODS)}.")
    given = HfFlags(
        profile=asked["profile"] or "", quantisation=asked["format"] or "none", gptq=asked["method"] == "gptq", **own
    )
    export_ascend_hf(source, output, given, asked["overwrite"], console)


HF_METHODS = ("gptq", "nearest")
WRITERS = {flags.ONNX: write_onnx, flags.UNIFORM: write_uniform, flags.OM: write_om, flags.HF: write_hf}


def check_folder(output: Path, source: Path, overwrite: bool) -> None:
    """Raise UserError unless the folder is free; the checkpoint's own `onnx` folder is a fine place."""
    if output.resolve() == source.resolve():
        raise UserError(f"The output {output} is the input folder; choose another, such as {output / 'onnx'}.")
    if output.exists() and not output.is_dir():
        raise UserError(f"The output {output} is a file; choose a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"The output {output} exists and is not empty; choose another folder or add --overwrite.")

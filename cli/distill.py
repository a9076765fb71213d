"""`lightpress distill-data`: a small part of the training data, chosen, or synthetic and made to train like more."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.console import Console
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.recover.data import DataStream
    from compress.recover.distill import Outcome, Request
    from compress.recover.functional import Model
    from compress.spec import ModelSpec

# Flags that do something with one method only.
NEEDS: Mapping[str, str] = {
    "pick": "loss", "like": "gradient", "prompt-tokens": "trajectory", "steps": "trajectory", "rank": "trajectory",
    "experts": "trajectory", "exchanges": "trajectory",
}  # fmt: skip
MOST_PARAMETERS = 10**9  # trajectories keep several copies of the model's factors and differentiate twice
BYTES = 4  # of a float32 parameter


def distill_data(
    *,
    source: options.Source,
    text: Annotated[
        list[Path],
        typer.Option("--text", help="Data: .jsonl (messages, prompt and response, or text), .txt. May be repeated."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL file to write.", rich_help_panel=options.OUTPUT)
    ],
    method: Annotated[
        str, typer.Option("--method", help="random, loss, gradient (as LESS), or trajectory (synthetic prompts).")
    ] = "random",
    share: Annotated[float, typer.Option("--share", help="Share of the data's tokens to write.")] = 0.05,
    pick: Annotated[
        str | None, typer.Option("--pick", help="Losses that --method loss takes: easy, medium or hard. [medium]")
    ] = None,
    like: Annotated[
        list[Path] | None, typer.Option("--like", help="Held-out text that --method gradient compares with.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", min=1, help="Tokens of a text that --method trajectory learns.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of learning the prompts.")] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Rank of the LoRA that trajectories are of; 0: all weights.")
    ] = None,
    experts: Annotated[int | None, typer.Option("--experts", min=1, help="Trajectories that are matched.")] = None,
    exchanges: Annotated[
        int | None, typer.Option("--exchanges", min=0, help="Trials of other documents: each trains on them. [50]")
    ] = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Most tokens of a document.")] = 512,
    field: options.Field = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a small part of the data to train on: rows chosen by a method, or synthetic ones.

    Example: lightpress distill-data ./model --text chats.jsonl --method loss --share 0.05 -o small.jsonl
    """
    own = {"prompt": prompt_tokens, "steps": steps, "rank": rank, "experts": experts, "exchanges": exchanges}
    check_flags(method, {"pick": pick, "like": like, **{flag_name(name): value for name, value in own.items()}})
    check_output(output, [*text, *(like or [])], overwrite)
    with Console(as_json, quiet) as console:
        from compress.recover.distill import Request
        from compress.recover.trajectory import TrajectoryOptions

        chosen = {name: value for name, value in own.items() if value is not None}
        request = Request(
            method, share, seed, pick or "medium", trajectory=TrajectoryOptions(seed=seed, **chosen)
        )
        facts = run_distill(source, (text, like or []), request, (length, field or "text", output), console)
        console.show(render_facts(facts, output))
        console.finish(facts)


def flag_name(name: str) -> str:
    """Return the flag of a trajectory's option."""
    return "prompt-tokens" if name == "prompt" else name


def check_flags(method: str, given: Mapping[str, Any]) -> None:
    """Raise UserError for a flag that does nothing with this method, and for gradients without a text to be like."""
    for name, wanted in NEEDS.items():
        if given[name] is not None and method != wanted:
            raise UserError(f"--{name} does nothing with --method {method}: leave it out, or give --method {wanted}.")
    if method == "gradient" and not given["like"]:
        raise UserError("--method gradient compares with a text that training should help with: give --like FILE.")


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raise UserError for an output that is there already, is one of the inputs, or has no folder."""
    if any(output.resolve() == path.resolve() for path in inputs):
        raise UserError(f"--output {output} is also an input; choose another file.")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file such as {output / 'small.jsonl'}.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already; choose another file or give --overwrite.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"There is no folder {output.absolute().parent} for the output; make it, or choose another.")


def run_distill(
    source: str, texts: tuple[list[Path], list[Path]], request: Request, place: tuple[int, str, Path], console: Console
) -> dict[str, Any]:
    """Choose or learn the rows, write them and return what is known of them; `place`: length, field, output."""
    from compress.checkpoint import open_checkpoint
    from compress.text import load_tokenizer
    from compress.weights import read_spec

    checkpoint = open_checkpoint(source)
    spec, tokenizer = read_spec(checkpoint), load_tokenizer(checkpoint.folder)
    check_size(checkpoint, spec, request.method)
    length, field, output = place
    streams = [
        open_data(checkpoint, spec, tokenizer, (paths, field, length), request) if paths else None for paths in texts
    ]
    stream = streams[0]
    assert stream is not None  # --text is required
    outcome = make_outcome(checkpoint, spec, tokenizer, (stream, streams[1]), request, console)
    write_rows(output, outcome.rows, checkpoint.folder.name)
    return {
        "method": request.method, "seed": request.seed, "output": str(output), **outcome.facts,
        "of_documents": stream.facts.documents, "of_tokens": stream.facts.tokens, "split": stream.facts.split,
        "left_out": stream.facts.unanswered,
    }  # fmt: skip


def check_size(checkpoint: Checkpoint, spec: ModelSpec, method: str) -> None:
    """Raise UserError where the model is too large for the method, or for this machine's memory."""
    from cli.estimate import free_memory

    if method == "random":
        return
    count = spec.shape.parameters
    if method == "trajectory" and count > MOST_PARAMETERS:
        raise UserError(
            f"{checkpoint.folder}: trajectories are matched on a proxy of at most 1 B parameters, and this model has "
            f"{count / 1e9:.1f} B; give a small model of the same kind instead."
        )
    free = free_memory()
    if free is not None and BYTES * count > free:
        raise UserError(
            f"{checkpoint.folder}: --method {method} needs the whole model in memory ({BYTES * count / 2**30:.1f} GiB "
            f"of {free / 2**30:.1f} free); give a smaller model of the same kind, or --method random."
        )


def open_data(
    checkpoint: Checkpoint, spec: ModelSpec, tokenizer: Any, data: tuple[list[Path], str, int], request: Request
) -> DataStream:
    """Open training files as the model's tokenizer and template see them."""
    from compress.recover.data import make_options, open_stream

    paths, field, length = data
    size = (1, min(length, spec.max_positions))
    plain = request.method == "trajectory"  # prompts are learned as they stand, without a template around them
    made = make_options(checkpoint.folder, checkpoint.config, size, seed=request.seed, field=field, plain=plain)
    return open_stream(paths, tokenizer, made)


def make_outcome(
    checkpoint: Checkpoint, spec: ModelSpec, tokenizer: Any, streams: tuple[DataStream, DataStream | None],
    request: Request, console: Console,
) -> Outcome:  # fmt: skip
    """Run the method; the model is read only where it is needed."""
    from compress.recover.distill import choose_rows, distil_rows
    from compress.recover.functional import load_model

    model: Model | None = None if request.method == "random" else load_model(checkpoint, spec)
    if model is None or request.method != "trajectory":
        return choose_rows(request, model, *streams, console.progress)
    return distil_rows(request, model, streams[0], tokenizer, list_barred(spec, tokenizer), console.progress)


def list_barred(spec: ModelSpec, tokenizer: Any) -> list[int]:
    """Return ids that no learned prompt may hold: special tokens, and embeddings without a token."""
    special = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    known = set(tokenizer.get_vocab(with_added_tokens=True).values())
    return sorted({one for one in special if one < spec.shape.vocab} | (set(range(spec.shape.vocab)) - known))


def write_rows(output: Path, rows: Iterable[dict[str, Any]], model: str) -> None:
    """Write rows as JSON lines into a sibling, which takes the output's name when it is whole."""
    work = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with work.open("w", encoding="utf-8") as lines:
            for row in rows:
                row["provenance"] = {"tool": "lightpress distill-data", "model": model, **row["provenance"]}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        work.replace(output)
    finally:
        work.unlink(missing_ok=True)


def render_facts(facts: Mapping[str, Any], output: Path) -> str:
    """Return the result in two or three sentences."""
    said = (
        f"Written to {output}: {facts['documents']} of {facts['of_documents']} documents, {facts['tokens']} of "
        f"{facts['of_tokens']} tokens ({100 * facts['share']:.1f} %)."
    )
    if facts["method"] != "trajectory":
        return said
    return (
        f"{said}\n{describe_exchanges(facts)}"
        f"Matching loss (1: no progress): {facts['matching_real']:.3f} with the real prompts, "
        f"{facts['matching_learned']:.3f} learned, {facts['matching_tokens']:.3f} as tokens.\n"
        f"{100 * facts['round_trip']:.0f} % of the prompts are the same tokens when their text is read again. The rows "
        "are marked synthetic; nobody wrote their prompts."
    )


def describe_exchanges(facts: Mapping[str, Any]) -> str:
    """Return how far exchanges of documents have led, as a line; nothing where none was tried."""
    if facts["lag_matched"] is None:
        return ""
    count = facts["exchanged"]
    return (
        f"Loss on other real text after training on the chosen documents: {facts['lag_matched']:.3f}, and "
        f"{facts['lag_exchanged']:.3f} after {count} exchange{'' if count == 1 else 's'}.\n"
    )

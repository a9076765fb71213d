"""`lightpress generate`: text from any folder that holds a model, printed as it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import Console


def generate(
    *,
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A checkpoint, a Lightpress output or an exported ONNX folder.")
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from; - reads standard input.")],
    new: Annotated[int, typer.Option("--new", min=1, help="Tokens to make at most.")] = 64,
    threads: options.Threads = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0: always the likeliest token; above: sample, 1 as the model says.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Sample among so many of the likeliest tokens; 0: among all.")
    ] = 40,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    stop: Annotated[bool, typer.Option("--stop/--no-stop", help="Stop at the model's end token.")] = True,
    runtime: Annotated[
        str,
        typer.Option("--runtime", help="onnx, torch, or auto: the ONNX graph where Lightpress wrote one, else torch."),
    ] = "auto",
    provider: Annotated[
        str, typer.Option("--provider", help="ONNX Runtime's execution provider; its CPU unless another is named.")
    ] = "",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a prompt, printing the text as it is made; speed goes to standard error.

    Example: lightpress generate ./model-70 "Once upon a time" --new 100
    """
    with Console(as_json, quiet) as console:
        from cli.stream import Question, Sampling, generate_text, render_answer
        from compress.report import make_plain

        sampling = Sampling(temperature, top_k, seed)
        answer = generate_text(Question(source, prompt, new, threads, sampling, stop, runtime, provider), console)
        console.note(render_answer(answer))
        console.finish(make_plain(answer))

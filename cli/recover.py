"""`lightpress recover`: train a cut model back towards the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import curriculum as order
from cli import options
from cli.distributed import CPU, DeviceOption, join_run, open_console, speak_once
from compress.errors import UserError

LOSS, RUN = options.REPAIR, options.OUTPUT
ROUNDS = options.ROUNDS
ROUND_FLAGS = ("policy_share", "temperature", "top_p", "answer_tokens")
# With --merge nothing is trained: only these flags count beside it.
MERGE_FLAGS = ("student", "output", "merge", "merge_rate", "overwrite", "no_verify", "threads", "as_json", "quiet")

Student = Annotated[str, typer.Argument(metavar="STUDENT", help="Folder of the cut model, or a hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=RUN)]
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="The dense model that it was cut from: folder or hub id.")
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        help="Training text: .txt, or .jsonl with text, prompt and response, or messages. May be repeated.",
        rich_help_panel=options.TEXT,
    ),
]
EvalText = Annotated[
    Path | None,
    typer.Option("--eval-text", help="Text for the held-out loss.", rich_help_panel=options.TEXT),
]
Field = Annotated[
    str, typer.Option("--field", help="Field of a .jsonl file that holds the text.", rich_help_panel=options.TEXT)
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain", help="Prompts with answers stay as they are, without the chat template.",
        rich_help_panel=options.TEXT,
    ),
]
Tokens = Annotated[str, typer.Option("--tokens", help="Tokens to train on, such as 500k or 20M.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Rows in one batch.")]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens in a row.")]
Accumulate = Annotated[int, typer.Option("--accumulate", min=1, help="Batches in one step.")]
Rate = Annotated[
    float | None, typer.Option("--lr", help="Highest learning rate. [default: by the model's width]")
]
Schedule = Annotated[
    str, typer.Option("--schedule", help="cosine, or wsd (a plateau, then a short decay).")
]
Warmup = Annotated[
    int | None, typer.Option("--warmup", min=0, help="Steps until the highest rate. [default: 5 %, at most 200]")
]
Decay = Annotated[float, typer.Option("--weight-decay", min=0, help="Decoupled decay of matrices.")]
Clip = Annotated[float, typer.Option("--clip", min=0, help="Largest norm of a step's gradient; 0: any.")]
Ema = Annotated[
    float,
    typer.Option("--ema", min=0, max=0.999999, help="Write a running mean of weights, such as 0.999; 0: off."),
]
Lora = Annotated[
    int | None,
    typer.Option("--lora", min=1, help="Train adapters of this rank on all projections, merged at the end."),
]
Loss = Annotated[
    str, typer.Option("--loss", help="kl (to the teacher), ce (the text) or mix.", rich_help_panel=LOSS)
]
Alpha = Annotated[
    float | None, typer.Option("--alpha", help="Share of kl in --loss mix. [default: 0.9]", rich_help_panel=LOSS)
]
Match = Annotated[
    str | None,
    typer.Option(
        "--match", metavar="S:T,...", help="Also match the stream after layer S to the teacher's after layer T.",
        rich_help_panel=LOSS,
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline/--online", help="Score the text once, keep the teacher's top tokens on disk, train without it.",
        rich_help_panel=LOSS,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", help="Where --offline keeps its scores for other runs.", rich_help_panel=LOSS),
]
Rounds = Annotated[
    int,
    typer.Option(
        "--rounds", min=0, help="After the text: rounds in which the student answers its prompts and learns from that.",
        rich_help_panel=ROUNDS,
    ),
]
PolicyShare = Annotated[
    float | None,
    typer.Option(
        "--policy-share", help="Share of --tokens that --rounds train on. [default: 0.5]", rich_help_panel=ROUNDS
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", help="Of the student's answers; 0: its likeliest tokens. [default: 1]", rich_help_panel=ROUNDS
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", help="Draw from the likeliest tokens that reach this probability. [default: 1]",
        rich_help_panel=ROUNDS,
    ),
]
AnswerTokens = Annotated[
    int | None,
    typer.Option(
        "--answer-tokens", min=1, help="Longest answer. [default: half of --length]", rich_help_panel=ROUNDS
    ),
]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Matrix products in bfloat16; masters stay float32.")]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--checkpointing/--no-checkpointing",
        help="Run layers again in the backward pass instead of keeping what it needs. [default: above 2 GiB]",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Order of the data, start of adapters.")]
EvalSteps = Annotated[int, typer.Option("--eval-steps", min=1, help="Steps between held-out losses.")]
SaveMinutes = Annotated[
    float, typer.Option("--save-minutes", min=0, help="Minutes between saved states.", rich_help_panel=RUN)
]
SaveSteps = Annotated[
    int | None, typer.Option("--save-steps", min=1, help="Save after so many steps too.", rich_help_panel=RUN)
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run that stopped before this output.", rich_help_panel=RUN),
]
Merge = Annotated[
    str | None,
    typer.Option(
        "--merge",
        metavar="A,B,...",
        help="Train nothing: write STUDENT moved towards the mean of these checkpoints.",
        rich_help_panel=RUN,
    ),
]
MergeRate = Annotated[
    float | None,
    typer.Option("--merge-rate", help="How far --merge moves. [default: 1, all the way]", rich_help_panel=RUN),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not re-open the output to prove it.", rich_help_panel=RUN)
]


def recover(
    *,
    context: typer.Context,
    student: Student,
    output: Output,
    teacher: Teacher = None,
    text: Text = None,
    eval_text: EvalText = None,
    field: Field = "text",
    plain: Plain = False,
    curriculum: order.Kind = None,
    difficulty: order.Measure = None,
    label: order.Label = None, label_order: order.LabelOrder = None,
    tokens: Tokens = "1M",
    batch: Batch = 8, length: Length = 256, accumulate: Accumulate = 1,
    rate: Rate = None,
    schedule: Schedule = "cosine",
    warmup: Warmup = None,
    decay: Decay = 0.0,
    clip: Clip = 1.0,
    ema: Ema = 0.0,
    lora: Lora = None,
    loss: Loss = "kl", alpha: Alpha = None,
    match: Match = None,
    offline: Offline = False,
    cache: Cache = None,
    rounds: Rounds = 0,
    policy_share: PolicyShare = None,
    temperature: Temperature = None, top_p: TopP = None, answer_tokens: AnswerTokens = None,
    bf16: Bf16 = False,
    checkpointing: Checkpointing = None,
    seed: Seed = 0,
    device: DeviceOption = CPU,
    eval_steps: EvalSteps = 100,
    save_minutes: SaveMinutes = 10.0, save_steps: SaveSteps = None,
    resume: Resume = False,
    merge: Merge = None, merge_rate: MergeRate = None,
    no_verify: NoVerify = False,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Train a cut model back: distillation from the dense model, or training on text.

    Example: lightpress recover ./model-70 --teacher ./model --text notes.txt --tokens 2M -o ./model-70-trained
    """
    asked = dict(context.params)
    with speak_once():
        refuse_idle(context, asked)
    with open_console(as_json, quiet) as console, join_run(device) as group:
        if not merge:
            from cli.training import run_recover

            console.finish(run_recover(asked, console, group))
        elif group.first:
            from cli.trained import run_merge

            console.finish(run_merge(asked, console))


def refuse_idle(context: Any, asked: dict[str, Any]) -> None:
    """Raise UserError for flags that the others make useless, and for what is missing."""
    given = {name for name in asked if context.get_parameter_source(name).name == "COMMANDLINE"}
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    if asked["merge"]:
        idle = sorted(given - set(MERGE_FLAGS))
        if idle:
            raise UserError(f"{flags[idle[0]]} does nothing with --merge, which trains nothing: leave one of them out.")
        return
    if asked["merge_rate"] is not None:
        raise UserError("--merge-rate does nothing without --merge: leave it out, or name checkpoints to merge.")
    if not asked["text"]:
        raise UserError("Training needs text: give --text FILE (.txt, .jsonl, .parquet); more than one may be given.")
    order.refuse_idle_order(asked)
    if not asked["rounds"]:
        idle = [name for name in ROUND_FLAGS if asked[name] is not None]
        if idle:
            raise UserError(f"{flags[idle[0]]} does nothing without --rounds: leave it out, or add --rounds 2.")
    refuse_untaught(asked)


def refuse_untaught(asked: dict[str, Any]) -> None:
    """Raise UserError where the loss and the flags about the teacher do not fit."""
    if asked["rounds"] and asked["loss"] == "ce":
        raise UserError(
            "--rounds with --loss ce would teach the student what it says anyway: give --teacher FOLDER with --loss kl "
            "or mix, or leave --rounds out."
        )
    taught = asked["loss"] != "ce" or asked["match"]
    if taught and asked["teacher"] is None:
        raise UserError(
            f"--loss {asked['loss']} needs the dense model: give --teacher FOLDER, or --loss ce to train on text alone."
        )
    if not taught and asked["teacher"] is not None:
        raise UserError("--teacher does nothing with --loss ce: leave it out, or give --loss kl or mix.")
    if asked["alpha"] is not None and asked["loss"] != "mix":
        raise UserError(f"--alpha does nothing with --loss {asked['loss']}: leave it out, or give --loss mix.")
    if asked["cache"] is not None and not asked["offline"]:
        raise UserError("--cache does nothing without --offline: leave it out, or add --offline.")
    if asked["offline"] and asked["loss"] == "ce":
        raise UserError("--offline stores what a teacher says, and --loss ce asks none: leave it out.")
    if asked["offline"] and asked["match"]:
        raise UserError("--match compares hidden states, which --offline does not store: leave one of them out.")

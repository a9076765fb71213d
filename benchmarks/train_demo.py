"""Train the demo checkpoint that ships in compress/demo/checkpoint, or measure it.

Run from the repository root:

    nohup python benchmarks/train_demo.py --minutes 60 > /tmp/train_demo.log 2>&1 &
    python benchmarks/train_demo.py --eval

Text comes from compress/demo/grammar.py; the tokenised corpus is kept in the temporary folder. The checkpoint is
replaced every few minutes, so a usable one exists early, and a last time once the learning rate has decayed to zero.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
ROOT = Path(__file__).resolve().parent.parent
# The script runs from a checkout as well as from an installed wheel.
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from torch.nn import functional  # noqa: E402
from transformers import Glm4Config, Glm4ForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from compress.demo.grammar import END_TOKEN, KINDS, Task, write_documents, write_tasks  # noqa: E402

CHECKPOINT = ROOT / "compress" / "demo" / "checkpoint"
WINDOW = 256
VOCABULARY = 1024
DOCUMENTS_A_CHUNK = 4000
TOKENIZER_DOCUMENTS = 20000
TRAIN_SEED, HELDOUT_SEED, TASK_SEED = 1, 2, 3
HELDOUT_WINDOWS = 96
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.98), 1.0
WARM_UP, DECAY_FROM = 0.02, 0.5
LOG_SECONDS, SAVE_SECONDS = 30.0, 240.0
# Depth-scaled gains of the post norms, c / sqrt(layers), as in Pangu Ultra (depth-scaled sandwich norm).
ATTENTION_GAIN, MLP_GAIN = 0.283, 0.432

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Options:
    """The command line of the training script."""

    minutes: float
    steps: int
    batch: int
    rate: float
    threads: int
    compile: bool
    corpus_tokens: int
    output: Path
    resume: bool
    eval: bool


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=55.0, help="end after this time (default: 55)")
    parser.add_argument("--steps", type=int, default=10**9, help="end after this many steps, if that is sooner")
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens a step (default: 8)")
    parser.add_argument("--rate", type=float, default=2.5e-3, help="peak learning rate (default: 2.5e-3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    parser.add_argument("--corpus-tokens", type=int, default=18_000_000, help="fresh tokens to prepare")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in the output folder")
    parser.add_argument("--eval", action="store_true", help="only measure the checkpoint in the output folder")
    return Options(**vars(parser.parse_args()))


def say(text: str) -> None:
    """Print a line at once, since the output usually goes to a file."""
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------ tokenizer and text


def train_tokenizer() -> Tokenizer:
    """Train the byte-level BPE tokenizer on generated text; the end token has id 0 and starts every encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END_TOKEN], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # Only first digits are shown, so that no two digits merge: sums stay a matter of single digits.
    texts = (re.sub(r"(?<=\d)\d", "", text) for text in write_documents(TOKENIZER_DOCUMENTS, TRAIN_SEED))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END_TOKEN} $A", special_tokens=[(END_TOKEN, 0)])
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer as transformers saves and loads it."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END_TOKEN, eos_token=END_TOKEN, pad_token=END_TOKEN,
        model_max_length=1024, clean_up_tokenization_spaces=False)


def encode_documents(tokenizer: Tokenizer, seed: int, split: str) -> Iterator[Tokens]:
    """Yield chunks of tokens without end, each document after an end token."""
    while True:
        texts = list(write_documents(DOCUMENTS_A_CHUNK, seed, split))
        # Text files have the end token on its own line: every second document is framed that way.
        texts[::2] = [f"\n{text}\n" for text in texts[::2]]
        encoded = tokenizer.encode_batch(texts)
        yield np.concatenate([np.asarray(one.ids, dtype=np.uint16) for one in encoded])
        seed += 1000


def collect_tokens(tokenizer: Tokenizer, count: int, seed: int, split: str) -> Tokens:
    """Return the first `count` tokens of a split, cut into windows `[windows, WINDOW]`."""
    chunks: list[Tokens] = []
    held = 0
    for chunk in encode_documents(tokenizer, seed, split):
        chunks.append(chunk)
        held += len(chunk)
        if held >= count:
            break
    windows = count // WINDOW
    return np.concatenate(chunks)[: windows * WINDOW].reshape(windows, WINDOW)


def prepare_corpus(tokenizer: Tokenizer, count: int) -> Tokens:
    """Return the training windows, from the temporary folder when an equal run has left them there."""
    source = (ROOT / "compress" / "demo" / "grammar.py").read_bytes() + tokenizer.to_str().encode()
    name = f"lightpress-demo-{hashlib.sha256(source).hexdigest()[:12]}-{count}.npy"
    path = Path(tempfile.gettempdir()) / name
    if not path.exists():
        partial = path.with_suffix(".part.npy")
        np.save(partial, collect_tokens(tokenizer, count, TRAIN_SEED, "train"))
        partial.replace(path)
    windows: Tokens = np.load(path, mmap_mode="r")
    return windows


# -------------------------------------------------------------------------------------------------------------- model


def build_model() -> Glm4ForCausalLM:
    """Build the model with small depth-scaled weights and post-norm gains."""
    config = Glm4Config(
        vocab_size=VOCABULARY, hidden_size=160, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, intermediate_size=448, tie_word_embeddings=True, attention_bias=False,
        max_position_embeddings=1024, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})
    model = Glm4ForCausalLM(config)
    layers = config.num_hidden_layers
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_self_attn_layernorm.weight.fill_(ATTENTION_GAIN / math.sqrt(layers))
            layer.post_mlp_layernorm.weight.fill_(MLP_GAIN / math.sqrt(layers))
    return model


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files under the class name that transformers 4 and other runtimes know too."""
    wrap_tokenizer(tokenizer).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def save_checkpoint(model: Glm4ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint in bfloat16 beside the folder, then move it into place."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    copy = Glm4ForCausalLM(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    for file in partial.iterdir():
        file.chmod(0o644)
    assert json.loads((partial / "config.json").read_text())["model_type"] == "glm4"
    previous = folder.with_name(folder.name + ".old")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- training


def schedule_rate(progress: float) -> float:
    """Return the factor of the learning rate at a progress of 0 to 1: warm-up, constant, linear decay to zero."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM)))


def make_optimizer(model: Glm4ForCausalLM, rate: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only; gains of norms are left alone."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": WEIGHT_DECAY},
                                    {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)


def compute_loss(model: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats of predicting each next token of `[windows, WINDOW]`."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


@torch.no_grad()
def measure_loss(model: Callable[..., Any], windows: Tokens, batch: int) -> float:
    """Return the mean loss in nats a token over the windows."""
    losses = [compute_loss(model, torch.from_numpy(windows[at:at + batch].astype(np.int64))).item()
              for at in range(0, len(windows) - batch + 1, batch)]
    return sum(losses) / len(losses)


@dataclass
class Progress:
    """Where a training run is: steps and seconds done, and the losses since the last line of the log."""

    options: Options
    started: float
    step: int = 0
    logged: float = 0.0
    logged_step: int = 0
    saved: float = 0.0
    total: float = 0.0

    def seconds(self) -> float:
        """Return the seconds since the start of training."""
        return time.monotonic() - self.started

    def part(self) -> float:
        """Return the part that is done, by steps or by time, whichever is further."""
        return max(self.step / self.options.steps, self.seconds() / (60 * self.options.minutes))


def log_progress(progress: Progress) -> None:
    """Print the step, the tokens, the speed and the mean training loss since the last line."""
    now, steps = progress.seconds(), progress.step - progress.logged_step
    size = progress.options.batch * WINDOW
    speed = steps * size / (now - progress.logged)
    say(f"{now:6.0f} s  step {progress.step:6d}  {progress.step * size / 1e6:6.2f}M tokens  {speed:6.0f} tok/s  "
        f"train {progress.total / steps:.4f}")
    progress.logged, progress.logged_step, progress.total = now, progress.step, 0.0


def take_step(model: Callable[..., Any], optimizer: torch.optim.AdamW, tokens: torch.Tensor, rate: float) -> float:
    """Update the weights once and return the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compute_loss(model, tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train_model(options: Options, tokenizer: Tokenizer, model: Glm4ForCausalLM) -> None:
    """Train until the budget is spent; log and save on the way."""
    windows = prepare_corpus(tokenizer, options.corpus_tokens)
    heldout = collect_tokens(tokenizer, HELDOUT_WINDOWS * WINDOW, HELDOUT_SEED, "heldout")
    if options.resume:
        # From the other end of the corpus: text that the first run has not read, or read longest ago.
        windows = np.flip(windows, axis=0)
    say(f"{sum(weight.numel() for weight in model.parameters())} parameters, {windows.size} tokens prepared")
    run = torch.compile(model) if options.compile else model
    optimizer = make_optimizer(model, options.rate)
    # Compiling takes a minute or more on a busy machine; the clock starts after it.
    take_step(run, optimizer, torch.from_numpy(windows[-options.batch:].astype(np.int64)), 0.0)
    progress = Progress(options, time.monotonic())
    while progress.part() < 1.0:
        at = progress.step * options.batch % (len(windows) - options.batch)
        tokens = torch.from_numpy(windows[at:at + options.batch].astype(np.int64))
        progress.total += take_step(run, optimizer, tokens, options.rate * schedule_rate(progress.part()))
        progress.step += 1
        if progress.seconds() - progress.logged > LOG_SECONDS:
            log_progress(progress)
        if progress.seconds() - progress.saved > SAVE_SECONDS:
            progress.saved = progress.seconds()
            save_checkpoint(model, tokenizer, options.output)
            say(f"{progress.seconds():6.0f} s  saved; held-out {measure_loss(model, heldout, options.batch):.4f}")
    save_checkpoint(model, tokenizer, options.output)
    say(f"done after {progress.step} steps; held-out {measure_loss(model, heldout, options.batch):.4f}")


# ---------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def answer_task(model: Glm4ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task) -> int:
    """Return the index of the choice that is likeliest after the prompt."""
    prompt: list[int] = tokenizer(task.prompt)["input_ids"]
    scores = []
    for choice in task.choices:
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
        scores.append(logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item())
    return scores.index(max(scores))


def report_checkpoint(folder: Path) -> None:
    """Print the held-out perplexity and the accuracy on each kind of task."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = Glm4ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    heldout = collect_tokens(tokenizer.backend_tokenizer, HELDOUT_WINDOWS * WINDOW, HELDOUT_SEED, "heldout")
    loss = measure_loss(model, heldout, 8)
    say(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    for kind in KINDS:
        tasks = write_tasks(kind, 200, TASK_SEED)
        right = sum(answer_task(model, tokenizer, task) == task.answer for task in tasks)
        chance = sum(1 / len(task.choices) for task in tasks) / len(tasks)
        say(f"{kind:10} {right / len(tasks):.3f}  (chance {chance:.3f})")


def main() -> None:
    """Train the checkpoint, or measure it with --eval."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.eval:
        report_checkpoint(options.output)
        return
    if options.resume:
        tokenizer = Tokenizer.from_file(str(options.output / "tokenizer.json"))
        model = Glm4ForCausalLM.from_pretrained(options.output, dtype=torch.float32)
    else:
        tokenizer, model = train_tokenizer(), build_model()
    train_model(options, tokenizer, model)
    report_checkpoint(options.output)


if __name__ == "__main__":
    main()

"""Train the larger evidence checkpoint (3.6 M parameters) on public-domain books; it is never committed.

    nohup python benchmarks/train_books.py /tmp/books --minutes 70 --threads 1 > /tmp/books.log 2>&1 &

A llama layout: 8 layers, hidden 192, 8 query and 4 key/value heads of 24, FFN 512, vocabulary 2048, tied. The last
twentieth of the text is never trained on; `heldout_text` returns it, and benchmarks/quality.py measures there.
"""

from __future__ import annotations

import argparse
import lzma
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch.nn import functional  # noqa: E402

BOOKS = ROOT.parent / "shared" / "data" / "books.txt.xz"
SEPARATOR = "<|endoftext|>"
WINDOW, VOCABULARY, HELDOUT_PART = 256, 2048, 0.05
SAVE_SECONDS, LOG_SECONDS = 300.0, 30.0


@dataclass(frozen=True)
class Options:
    """The command line."""

    folder: Path
    minutes: float
    batch: int
    rate: float
    threads: int
    books: Path


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the checkpoint, made by this script")
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--rate", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--books", type=Path, default=BOOKS)
    return Options(**vars(parser.parse_args()))


def split_text(books: Path) -> tuple[str, str]:
    """Return the training text and the held-out text."""
    text = lzma.decompress(books.read_bytes()).decode()
    at = int(len(text) * (1 - HELDOUT_PART))
    return text[:at], text[at:]


def heldout_text(books: Path = BOOKS) -> str:
    """Return the text that the checkpoint was not trained on."""
    return split_text(books)[1]


def train_tokenizer(text: str) -> Tokenizer:
    """Train the byte-level BPE tokenizer on a fifth of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[SEPARATOR], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text[at:at + 20000] for at in range(0, len(text), 100000)), trainer)
    return tokenizer


def encode_windows(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the text as windows of token ids `[windows, WINDOW]`, one encoding per line to bound memory."""
    pieces = [np.asarray(one.ids, dtype=np.int32) for one in tokenizer.encode_batch(text.splitlines(keepends=True))]
    ids = np.concatenate(pieces)
    return torch.from_numpy(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.int64))


def build_model() -> torch.nn.Module:
    """Build the model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=24, intermediate_size=512, tie_word_embeddings=True, max_position_embeddings=1024,
        rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM(config)


def save_checkpoint(model: torch.nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint in float32 with its tokenizer."""
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR).save_pretrained(folder)


def compute_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


@torch.no_grad()
def measure_loss(model: torch.nn.Module, windows: torch.Tensor, batch: int) -> float:
    """Return the mean loss over 64 windows."""
    losses = [compute_loss(model, windows[at:at + batch]).item() for at in range(0, 64, batch)]
    return sum(losses) / len(losses)


def train_model(options: Options, model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    """Train until the time is spent: warm-up, constant, linear decay over the second half."""
    from train_demo import make_optimizer, schedule_rate

    training, heldout = (encode_windows(tokenizer, text) for text in split_text(options.books))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {training.numel()} training tokens", flush=True)
    run, optimizer = torch.compile(model), make_optimizer(model, options.rate)
    order = torch.randperm(len(training))
    started = time.monotonic()
    step, logged, saved, total, since = 0, 0.0, 0.0, 0.0, 0
    while (seconds := time.monotonic() - started) < options.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * schedule_rate(seconds / (options.minutes * 60))
        at = step * options.batch % (len(order) - options.batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compute_loss(run, training[order[at:at + options.batch]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, total, since = step + 1, total + loss.item(), since + 1
        if seconds - logged > LOG_SECONDS:
            print(f"{seconds:6.0f} s  step {step}  {step * options.batch * WINDOW / 1e6:.2f}M tokens  "
                  f"train {total / since:.4f}", flush=True)
            logged, total, since = seconds, 0.0, 0
        if seconds - saved > SAVE_SECONDS:
            save_checkpoint(model, tokenizer, options.folder)
            saved = seconds
            print(f"{seconds:6.0f} s  saved; held-out {measure_loss(run, heldout, options.batch):.4f}", flush=True)
    save_checkpoint(model, tokenizer, options.folder)
    print(f"done after {step} steps; held-out {measure_loss(run, heldout, options.batch):.4f}", flush=True)


def main() -> None:
    """Train the checkpoint."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(split_text(options.books)[0])
    train_model(options, build_model(), tokenizer)


if __name__ == "__main__":
    main()

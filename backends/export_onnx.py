"""Export a checkpoint as an ONNX graph with a key/value cache, straight from its tensors, one layer at a time.

Nothing is traced: the graph is written from the same description that `compress.decoder` runs. All weights go to
`model.onnx.data` (external data), so that a graph never meets protobuf's 2 GiB limit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from onnx import TensorProto

from backends.genai import write_genai_config
from backends.onnx_fused import (
    MICROSOFT,
    Matrix,
    Stored,
    Stream,
    Weights,
    emit_fused_frame,
    emit_fused_layer,
    emit_product,
    emit_stream_norm,
    store_fused,
    store_quantised,
)
from backends.onnx_graph import ELEMENT_TYPES, GRAPH_FILE, GraphBuilder
from backends.onnx_layers import emit_capped, emit_frame, emit_layer, emit_norm, emit_scaled, store_layer
from backends.ort import KEEP
from compress.checkpoint import Checkpoint
from compress.checkpoint_writer import check_space, sync_path
from compress.errors import UserError
from compress.quantize.blocks import Quantised
from compress.spec import ModelSpec
from compress.weights import read_layer, read_spec

GRAPH_NAME = GRAPH_FILE
DATA_NAME = "model.onnx.data"
GRAPH_ROOM = 64 * 2**20  # bytes, more than the graph and the tokenizer files of any model take
Progress = Callable[[int, int], None]
PAST = "past_sequence"
EMBEDDINGS = "embeddings"
TOTAL = "past_sequence + sequence"
EVERYTHING = 2**31 - 1


class Quantiser(Protocol):
    """What turns weights into quantised ones, layer by layer in order; what it leaves alone stays float32."""

    def quantise_layer(self, index: int, weights: Mapping[str, torch.Tensor]) -> Mapping[str, Matrix]:
        """Return one layer's weights by role, matrices quantised."""
        ...

    def estimate_bytes(self) -> int:
        """Return about the bytes that all weights will take."""
        ...

    def sample_logits(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids of some windows and the logits behind the quantised layers, once these are done."""
        ...

    def quantise_ends(self, checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Quantised | None, Quantised | None]:
        """Return embedding and output head, each None where it stays as it is; a tied model's are one object."""
        ...


@dataclass(frozen=True)
class GraphForm:
    """How the graph is written.

    `fused`: with ONNX Runtime's own operators, else with those of the ONNX standard alone. `dtype` is float32, or
    float64 for proofs of standard graphs. `quantiser`: what becomes of the weights of a fused graph.
    """

    fused: bool = True
    dtype: torch.dtype = torch.float32
    quantiser: Quantiser | None = None


FUSED, STANDARD = GraphForm(), GraphForm(fused=False)


def export_onnx(
    checkpoint: Checkpoint, folder: Path, progress: Progress | None = None, form: GraphForm = FUSED
) -> Path:
    """Write model.onnx, model.onnx.data and the tokenizer files into `folder` and return the graph's path.

    Inputs: input_ids `[batch, sequence]`, attention_mask `[batch, past + sequence]` (int64), position_ids as input_ids
    (standard graphs only), and per layer past_key_values.N.key/.value `[batch, kv_heads, past, head_dim]`; outputs:
    logits `[batch, sequence, vocab]` and present.N.key/.value. A fused graph computes the logits of the last positions
    alone, as many as its input logits_to_keep says, if that is given. `progress` gets layers written and all layers.
    Raises UserError when the checkpoint does not fit its config, or the folder cannot be written.
    """
    dtype = form.dtype
    if dtype not in ELEMENT_TYPES:
        raise UserError(f"An ONNX graph of {dtype} is not supported; export it as torch.float32.")
    spec = read_spec(checkpoint)
    weights = form.quantiser.estimate_bytes() if form.quantiser else spec.shape.parameters * dtype.itemsize
    check_space(folder, weights + GRAPH_ROOM)
    try:
        with FolderWriter(folder) as writer:
            write = write_fused if form.fused else write_model
            write(writer, checkpoint, spec, progress, form)
        for file in checkpoint.side_files():
            shutil.copyfile(file, folder / file.name)
        if form.fused:
            write_genai_config(folder, spec, read_generation(checkpoint.folder))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{folder} cannot be written ({reason}); choose another output folder.") from error
    return folder / GRAPH_NAME


def read_generation(folder: Path) -> dict[str, Any]:
    """Return what generation_config.json says, nothing where there is none that can be read."""
    try:
        data = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


class FolderWriter:
    """Graph and data file under temporary names, which take their places when the block ends well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = False
        # The same names in every run, so that the next one overwrites what a killed one left.
        self.graph = folder / f".{GRAPH_NAME}.part"
        self.data_path = folder / f".{DATA_NAME}.part"

    def __enter__(self) -> FolderWriter:
        """Open the data file, in a folder made for it if there is none."""
        self.made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = self.data_path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Put both files in place, or remove them after an error."""
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                self.data.close()
            self.graph.unlink(missing_ok=True)
            self.data_path.unlink(missing_ok=True)
            if kind is not None and self.made:
                with suppress(OSError):
                    self.folder.rmdir()

    def _finish(self) -> None:
        self.data.flush()
        os.fsync(self.data.fileno())
        # An old graph must not survive a crash between the two renames: it would read the new data file.
        (self.folder / GRAPH_NAME).unlink(missing_ok=True)
        self.data_path.rename(self.folder / DATA_NAME)
        self.graph.rename(self.folder / GRAPH_NAME)
        sync_path(self.folder)

    def write_graph(self, serialized: bytes) -> None:
        """Write the graph under its temporary name."""
        with self.graph.open("wb") as stream:
            stream.write(serialized)
            stream.flush()
            os.fsync(stream.fileno())


def write_fused(
    writer: FolderWriter, checkpoint: Checkpoint, spec: ModelSpec, progress: Progress | None, form: GraphForm
) -> None:
    """Stream the weights, quantised if asked for, into the data file while the fused graph grows; write the graph."""
    graph, quantiser = GraphBuilder(writer.data, DATA_NAME), form.quantiser
    declare_interface(graph, spec, fused=True)
    frame = emit_fused_frame(graph, spec)
    stream = Stream(EMBEDDINGS)  # emitted last: how many bits it has is known when all layers are quantised
    for index in range(len(spec.layers)):
        stored = store_fused(graph, spec, f"layers.{index}", read_matrices(checkpoint, spec, index, quantiser))
        stream = emit_fused_layer(graph, spec, index, stored, stream, frame)
        if progress is not None:
            progress(index + 1, len(spec.layers))
    ends = store_ends(graph, checkpoint, spec, quantiser)
    start = len(graph.nodes)
    graph.rename(emit_scaled(graph, ends.embed(graph, "input_ids"), spec.embedding_multiplier), EMBEDDINGS)
    graph.move_first(start)
    norm = checkpoint.read_one(spec.names["final_norm"], torch.float32) + spec.norm_offset
    emit_last_logits(graph, spec, stream, graph.store("final_norm.weight", norm), ends)
    writer.write_graph(graph.build_model("lightpress").SerializeToString(deterministic=True))


def read_matrices(checkpoint: Checkpoint, spec: ModelSpec, index: int, quantiser: Quantiser | None) -> Weights:
    """Return a layer's weights by role, quantised if asked for."""
    dense = read_layer(checkpoint, spec, index, torch.float32)
    return dict(quantiser.quantise_layer(index, dense) if quantiser else dense)


def write_model(
    writer: FolderWriter, checkpoint: Checkpoint, spec: ModelSpec, progress: Progress | None, form: GraphForm
) -> None:
    """Stream the weights into the data file while the graph grows, then write the graph."""
    dtype = form.dtype
    graph = GraphBuilder(writer.data, DATA_NAME, dtype)
    declare_interface(graph, spec)
    frame = emit_frame(graph, spec)
    embedding = store_matrix(graph, checkpoint, spec.names["embed"], "embed.weight")
    value = emit_embedding(graph, spec, embedding)
    for index in range(len(spec.layers)):
        names = store_layer(graph, spec, f"layers.{index}", read_layer(checkpoint, spec, index, dtype))
        value = emit_layer(graph, spec, index, names, value, frame)
        if progress is not None:
            progress(index + 1, len(spec.layers))
    head = embedding if spec.shares_ends else store_matrix(graph, checkpoint, spec.names["head"], "head.weight")
    norm = checkpoint.read_one(spec.names["final_norm"], dtype) + spec.norm_offset
    emit_logits(graph, spec, value, graph.store("final_norm.weight", norm), head)
    writer.write_graph(graph.build_model("lightpress").SerializeToString(deterministic=True))


def declare_interface(graph: GraphBuilder, spec: ModelSpec, fused: bool = False) -> None:
    """Declare the graph's inputs and outputs, in the order that runtimes expect."""
    graph.add_input("input_ids", ("batch", "sequence"), TensorProto.INT64)
    graph.add_input("attention_mask", ("batch", TOTAL), TensorProto.INT64)
    if not fused:
        graph.add_input("position_ids", ("batch", "sequence"), TensorProto.INT64)
    graph.add_output("logits", ("batch", "sequence", spec.shape.vocab))
    for index, layer in enumerate(spec.shape.layers):
        for part in ("key", "value"):
            graph.add_input(f"past_key_values.{index}.{part}", ("batch", layer.kv_heads, PAST, layer.head_dim))
            graph.add_output(f"present.{index}.{part}", ("batch", layer.kv_heads, TOTAL, layer.head_dim))


def store_matrix(graph: GraphBuilder, checkpoint: Checkpoint, stored: str, name: str) -> str:
    """Copy a matrix `[vocab, hidden]` into the data file as it lies, a block of rows in memory."""
    rows, width = checkpoint.tensors[stored].shape
    return graph.store_blocks(name, (rows, width), checkpoint.read_blocks(stored, graph.dtype))


def emit_embedding(graph: GraphBuilder, spec: ModelSpec, matrix: str) -> str:
    """Append the scaled embeddings `[batch, sequence, hidden]`."""
    graph.scope = "embed"
    return emit_scaled(graph, graph.add("Gather", matrix, "input_ids"), spec.embedding_multiplier)


def emit_logits(graph: GraphBuilder, spec: ModelSpec, value: str, norm: str, matrix: str) -> None:
    """Append the final norm and the output head.

    The matrix stays `[vocab, hidden]`, so that a tied model stores it once and an untied one is never transposed in
    memory here. Runtimes fold the Transpose of a constant when they open the graph. (A Gemm with transB was as fast to
    decode but needs two Reshapes, and the one that makes the logits copies them: 8 % of a prefill.)
    """
    graph.scope = "head"
    normed = emit_norm(graph, value, norm, spec.eps)
    capped = spec.logit_divisor != 1.0 or spec.logit_softcap is not None
    rows = graph.add("MatMul", normed, graph.add("Transpose", matrix, perm=[1, 0]), output="" if capped else "logits")
    if capped:
        emit_capped(graph, rows, 1.0 / spec.logit_divisor, spec.logit_softcap, output="logits")


# Embedding and head of a fused graph


@dataclass(frozen=True)
class Ends:
    """Embedding and head as stored: the name of a float matrix `[vocab, hidden]`, or a quantised product."""

    embedding: str | Stored
    head: str | Stored

    def embed(self, graph: GraphBuilder, ids: str) -> str:
        """Append the rows of token ids."""
        graph.scope = "embed"
        table = self.embedding
        if isinstance(table, str):
            return graph.add("Gather", table, ids)
        codes, scales, *zeros = table.names
        # The same bytes as the head's, seen as one row per token; runtimes fold the Reshape of a constant.
        rows = graph.add("Reshape", codes, graph.integers(table.outputs, -1))
        found = graph.add(
            "GatherBlockQuantized", rows, ids, scales, *zeros, domain=MICROSOFT, bits=table.bits,
            block_size=table.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if table.inputs % table.block == 0:
            return found
        return graph.add("Slice", found, graph.integers(0), graph.integers(table.inputs), graph.integers(-1))  # padding

    def project(self, graph: GraphBuilder, value: str) -> str:
        """Append the product with the output head."""
        if isinstance(self.head, Stored):
            return emit_product(graph, self.head, value)
        return graph.add("MatMul", value, graph.add("Transpose", self.head, perm=[1, 0]))


def store_ends(
    graph: GraphBuilder, checkpoint: Checkpoint, spec: ModelSpec, quantiser: Quantiser | None
) -> Ends:
    """Store embedding and head, once where they are the same."""
    small = quantiser.quantise_ends(checkpoint, spec) if quantiser else (None, None)
    stored: list[str | Stored] = []
    for matrix, name in zip(small, ("embed", "head"), strict=True):
        if name == "head" and spec.shares_ends and matrix is small[0]:
            stored.append(stored[0])
        elif matrix is None:
            stored.append(store_matrix(graph, checkpoint, spec.names[name], f"{name}.weight"))
        else:
            stored.append(store_quantised(graph, name, [matrix], ""))
    return Ends(*stored)


def emit_last_logits(graph: GraphBuilder, spec: ModelSpec, stream: Stream, norm: str, ends: Ends) -> None:
    """Append the final norm and the head for all positions, or the last ones that the input `logits_to_keep` asks for.

    onnxruntime-genai, which does not know that input, wants all.
    """
    graph.scope = "head"
    keep = graph.add_default(KEEP, EVERYTHING)
    start = graph.add("Neg", keep)
    last = [
        graph.add("Slice", part, start, graph.integers(EVERYTHING), graph.integers(1))
        for part in (stream.value, stream.added)
        if part
    ]
    normed, _ = emit_stream_norm(graph, spec, Stream(*last), norm)
    capped = spec.logit_divisor != 1.0 or spec.logit_softcap is not None
    if not capped:
        graph.rename(ends.project(graph, normed), "logits")
        return
    emit_capped(graph, ends.project(graph, normed), 1.0 / spec.logit_divisor, spec.logit_softcap, output="logits")

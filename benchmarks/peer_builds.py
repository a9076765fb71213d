"""The peers' own files from one Hugging Face folder; cpu_peers.py runs it in the peers' environment.

    python benchmarks/peer_builds.py gguf|openvino MODEL OUT FORMAT

Writes OUT/model.gguf or OUT/openvino_model.xml and .bin, with peer.json beside: the bytes of weights that a decoded
token reads. GGUF tensors are written with the `gguf` package and quantised by llama.cpp's own code (Q8_0 and Q4_0,
plain: no statistics). OpenVINO's graph comes from transformers' exporter, its int8 (a scale per row) and int4
(symmetric, 32 inputs to a scale, embedding and head int8) from nncf.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "glm4": ("glm4", False)}  # rows to reorder
FILE_TYPES = {"fp32": 0, "bf16": 32, "int8": 7, "int4": 2}  # llama.cpp's enum llama_ftype: F32, BF16, Q8_0, Q4_0
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


# llama.cpp


def read_tensors(model: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield all tensors of a folder in float32, one in memory at a time."""
    import torch
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(str(file), "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 # not a dict
                yield name, handle.get_tensor(name).to(torch.float32).numpy()


def pair_rows(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of q or k from halves to neighbouring pairs, which llama.cpp's rotation takes."""
    half = len(values) // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def add_sizes(writer: Any, config: dict[str, Any]) -> None:
    """Write the sizes of the model, and that it has no tokenizer."""
    rope = config.get("rope_parameters") or config
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(FILE_TYPES["fp32"])


def write_gguf(model: Path, file: Path) -> None:
    """Write a float32 GGUF file of a plain decoder; ValueError for a kind that this writer does not know."""
    import gguf

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"no GGUF writer here for {config['model_type']}")
    kind, reorder = ARCHITECTURES[config["model_type"]]
    places = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == kind), 512)
    writer = gguf.GGUFWriter(file, kind)
    add_sizes(writer, config)
    for name, values in read_tensors(model):
        place = places.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ValueError(f"GGUF has no place for {name}")
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        writer.add_tensor(place, pair_rows(values, config[heads]) if heads and reorder else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise_gguf(source: Path, target: Path, name: str) -> None:
    """Quantise with llama.cpp's own code."""
    import llama_cpp as ll

    settings = ll.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[name], 2
    if ll.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        raise RuntimeError("llama_model_quantize failed")


def build_gguf(model: Path, out: Path, name: str) -> int:
    """Write OUT/model.gguf of one format; return the bytes of weights that a token reads."""
    import gguf

    whole = out.parent / "llama-fp32.gguf"
    if not whole.exists():
        write_gguf(model, draft := whole.with_suffix(".part"))
        draft.rename(whole)
    if name == "fp32":
        (out / "model.gguf").hardlink_to(whole)
    else:
        quantise_gguf(whole, out / "model.gguf", name)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


# OpenVINO


def export_graph(model: Path) -> Any:
    """Return OpenVINO's graph with its cache as state, from transformers' exporter."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    cache, past, new = DynamicCache(config=loaded.config), 3, 4
    with torch.no_grad():
        loaded(torch.ones(2, past, dtype=torch.long), past_key_values=cache, use_cache=True)
    inputs = {
        "input_ids": torch.ones(2, new, dtype=torch.long),
        "attention_mask": torch.ones(2, past + new, dtype=torch.long),
        "position_ids": torch.arange(past, past + new).expand(2, new).contiguous(),
        "past_key_values": cache,
    }
    return OpenVINOExporter().export(loaded, inputs, config=OpenVINOConfig(dynamic=True)).program


def compress_graph(graph: Any, name: str) -> Any:
    """Compress the graph's weights with nncf."""
    import nncf

    if name == "int8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32, ratio=1.0)


def rename_ports(graph: Any) -> None:
    """Give inputs and outputs the names that OpenVINO GenAI looks for: without the exporter's `input.`."""
    for port in (*graph.inputs, *graph.outputs):
        port.get_tensor().set_names({name.rsplit(".", 1)[-1] for name in port.get_names()})


def count_read(graph: Any) -> int:
    """Return the bytes of constants less those that only a Gather picks rows from."""

    def is_table(node: Any) -> bool:
        while node.get_type_name() in ("Constant", "Convert", "Multiply", "Subtract", "Reshape"):
            users = node.output(0).get_target_inputs()
            if len(users) != 1:
                return False
            node = next(iter(users)).get_node()
        return bool(node.get_type_name() == "Gather")

    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    large = [node for node in constants if len(node.shape) > 1]
    return sum(node.get_byte_size() for node in large if not is_table(node))


def copy_tokenizer(model: Path, out: Path) -> None:
    """Put config, tokenizer and OpenVINO's form of it beside the graph, as the pipeline asks for them."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    shutil.copy(model / "config.json", out)
    for file in TOKENIZER:
        if (model / file).is_file():
            shutil.copy(model / file, out)
    pair = convert_tokenizer(AutoTokenizer.from_pretrained(model), with_detokenizer=True)
    for graph, title in zip(pair, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(graph, str(out / f"openvino_{title}.xml"))


def build_openvino(model: Path, out: Path, name: str) -> int:
    """Write OUT/openvino_model.xml of one format; return the bytes of weights that a token reads."""
    import openvino

    whole = out.parent / "openvino-graph"
    if not (whole / "openvino_model.xml").exists():
        graph = export_graph(model)
        rename_ports(graph)
        whole.mkdir(exist_ok=True)
        openvino.save_model(graph, str(whole / "draft.xml"), compress_to_fp16=False)
        (whole / "draft.bin").rename(whole / "openvino_model.bin")
        (whole / "draft.xml").rename(whole / "openvino_model.xml")
    graph = openvino.Core().read_model(str(whole / "openvino_model.xml"))
    if name != "fp32":
        graph = compress_graph(graph, name)
    openvino.save_model(graph, str(out / "openvino_model.xml"), compress_to_fp16=False)
    copy_tokenizer(model, out)
    return count_read(graph)


def main() -> None:
    """Build one folder."""
    peer, model, out, name = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    out.mkdir(parents=True, exist_ok=True)
    read = {"gguf": build_gguf, "openvino": build_openvino}[peer](model, out, name)
    (out / "peer.json").write_text(json.dumps({"token_bytes": read}), encoding="utf-8")


if __name__ == "__main__":
    main()

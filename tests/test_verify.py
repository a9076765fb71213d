"""Proofs come from fresh processes and judge logits: one wrong tensor of a folder that opens well must be found."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from backends.eager import load_eager
from backends.export_onnx import export_onnx
from backends.verify import explain_skip, find_error, judge, make_environment, verify_folder
from compress.checkpoint import open_checkpoint

TENSOR = "model.layers.2.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """A tiny folder with its ONNX export, and a sample of what it computes."""
    folder = make_checkpoint(tmp_path_factory.mktemp("verify") / "model", "llama")
    checkpoint = open_checkpoint(folder)
    export_onnx(checkpoint, folder / "onnx")
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    return folder, ids, torch.from_numpy(load_eager(checkpoint).prefill(ids.numpy())[0])


def test_corrupt_tensor_is_found_where_it_is(proven):
    folder, ids, logits = proven
    tensors = load_file(folder / "model.safetensors")
    damaged = tensors | {TENSOR: tensors[TENSOR].flip(0)}
    save_file(damaged, folder / "model.safetensors", metadata={"format": "pt"})
    proofs = verify_folder(folder, ids, logits, onnx=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert [(proof.runtime, proof.status) for proof in proofs] == [
        ("transformers", "different"), ("onnxruntime", "equal"),
    ]  # fmt: skip
    assert "logits differ" in proofs[0].reason
    assert proofs[1].agreement == 1


def test_missing_tensor_is_not_filled_with_noise(proven, tmp_path):
    folder, ids, logits = proven
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(folder / "model.safetensors")
    del tensors[TENSOR]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text((folder / "config.json").read_text())
    (proof,) = verify_folder(broken, ids, logits, onnx=False)
    assert proof.status == "different"
    assert TENSOR in proof.reason


def test_absent_graph_is_reported(proven, tmp_path):
    folder, ids, logits = proven
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "PanguUltra"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    skipped, failed = verify_folder(tmp_path, ids, logits, onnx=True)
    assert (skipped.status, failed.status) == ("skipped", "different")
    assert "no model.onnx" in failed.reason


def test_uneven_folder_is_not_given_to_transformers(proven, tmp_path):
    config = json.loads((proven[0] / "config.json").read_text())
    config["per_layer_config"] = {"1": {"intermediate_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "per layer" in explain_skip(tmp_path)


def test_judgement():
    assert judge("any", 1e-3, 0.009, 10.0, 1.0).status == "equal"
    assert judge("any", 1e-3, 0.011, 10.0, 1.0).status == "different"
    assert judge("any", 1e-3, float("nan"), 10.0, 0.0).status == "different"
    assert find_error("Traceback\n  x\nValueError: no.\n\n") == "ValueError: no"
    assert find_error("") == "it was killed"
    assert make_environment()["HF_HUB_OFFLINE"] == "1"

"""What `compress` and `export` leave for the runtime of a device: graphs in its format, folders for Ascend."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from typer.testing import CliRunner
from words import write_tokenizer, write_words

from backends.ascend_check import check_folder
from backends.ascend_rules import find_profile_soc
from backends.export_onnx import export_onnx
from cli.app import app
from cli.artifact import measure_graph
from compress.checkpoint import open_checkpoint
from compress.errors import UserError
from compress.evaluate import measure_quality
from compress.text import Windows
from compress.weights import read_spec

FAST = ("--keep", 0.8, "--windows", 6, "--length", 24, "--threads", 1, "--trials", 0, "--refine", 0, "--no-bench")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "words.txt", 30)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Heads of 16, as the attention kernels of Ascend's servers take them."""
    return make_model(tmp_path_factory.mktemp("models") / "wide", "qwen3")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "narrow", "llama")


def make_model(folder, case):
    make_checkpoint(folder, case, hidden_size=64, intermediate_size=96)
    write_tokenizer(folder)
    return folder


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.stderr, done.exception)
    return done


def compress(source, text, out, *flags):
    """Compress with --json; return the report and what was printed on stderr."""
    done = run("compress", source, "--text", text, "-o", out, *FAST, *flags, "--json")
    return json.loads(done.stdout), done.stderr


def test_perplexity_of_a_graph_is_that_of_its_checkpoint(narrow, tmp_path):
    checkpoint = open_checkpoint(narrow)
    export_onnx(checkpoint, tmp_path / "onnx")
    windows = Windows(torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(0)), "random")
    found = measure_quality(checkpoint, read_spec(checkpoint), windows).perplexity
    assert measure_graph(tmp_path / "onnx", windows, 1) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_format_that_was_timed_is_the_one_that_is_written(name, narrow, text, tmp_path):
    report, _ = compress(narrow, text, tmp_path / "out", "--profile", "cpu-avx512", "--format", name)
    assert report["graph_format"] == name
    proofs = {proof["runtime"]: proof for proof in report["proofs"]}
    assert proofs["onnxruntime"]["status"] == "close"
    assert 0 < proofs["onnxruntime"]["max_error"]  # held against the quantised layers, not the float ones
    assert f"its {name} graph has a perplexity of" in report["comparison"]["quality_note"]
    assert len(report["next_steps"]) == 3
    exact, _ = compress(narrow, text, tmp_path / "exact", "--profile", "cpu-avx512")
    assert exact["graph_format"] == "fp32"
    sizes = [(tmp_path / folder / "onnx/model.onnx.data").stat().st_size for folder in ("out", "exact")]
    assert sizes[0] < sizes[1]
    assert json.loads((tmp_path / "out/lightpress.json").read_text())["graph_format"] == name


def test_an_om_profile_writes_what_atc_compiles(narrow, text, tmp_path):
    report, _ = compress(narrow, text, tmp_path / "out", "--profile", "ascend-310b1", "--no-verify")
    folder = tmp_path / "out/ascend"
    assert {"build_om.sh", "build.json", "io.json", "run_om.py", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    assert not check_folder(folder).errors
    first, compile_it, run_it = report["next_steps"]
    assert str(folder) in first and "Ascend310B1" in first  # the output's place, not the hidden one it was made in
    assert f"{folder}/build_om.sh" in compile_it
    assert "run_om.py" in run_it


@pytest.mark.parametrize(
    ("profile", "flags", "expected"),
    [
        ("ascend-310p3", (), ("float16", None)),
        ("ascend-310p3", ("--format", "w8a8"), ("float16", "W8A8")),
        ("ascend-910b2", (), ("bfloat16", None)),
        ("ascend-910b2", ("--format", "w8a8"), ("bfloat16", "W8A8_DYNAMIC")),
    ],
)
def test_a_server_profile_writes_its_folder(profile, flags, expected, wide, text, tmp_path):
    dtype, quantisation = expected
    report, _ = compress(wide, text, tmp_path / "out", "--profile", profile, "--axes", "ffn", "--no-verify", *flags)
    folder = tmp_path / "out/ascend"
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    description = folder / "quant_model_description.json"
    assert description.is_file() == (quantisation is not None)
    if quantisation is not None:
        assert quantisation in json.loads(description.read_text()).values()
    assert not check_folder(folder, find_profile_soc(profile)).errors
    assert "vllm serve" in report["next_steps"][2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no scratch folder is left


def test_a_model_that_the_servers_cannot_open_is_refused_before_the_work(narrow, text, tmp_path):
    flags = ("compress", narrow, "--text", text, "-o", tmp_path / "out", *FAST, "--profile", "ascend-310p3")
    done = run(*flags, code=2)
    assert "multiple of 16" in done.stderr and "--no-export" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    run(*flags, "--no-export", "--no-verify", "--quiet")
    assert not (tmp_path / "out/ascend").exists()


def test_what_only_the_result_shows_costs_no_checkpoint(wide, text, tmp_path, monkeypatch):
    def overflow(*given):
        raise UserError("Tensor x holds values up to 1e5, and float16 ends at 65504.")

    monkeypatch.setattr("cli.artifact.export_hf", overflow)
    report, said = compress(wide, text, tmp_path / "out", "--profile", "ascend-310p3", "--no-verify")
    assert "nothing was written for ascend-310p3" in said
    assert "float16 ends" in report["artifact_error"]
    assert "float16 ends" in json.loads((tmp_path / "out/lightpress.json").read_text())["artifact_error"]
    assert report["next_steps"] == []
    assert (tmp_path / "out/model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_graph_is_evaluated_on_a_text_as_its_checkpoint_is(narrow, text, tmp_path):
    run("export", narrow, "-o", tmp_path / "onnx", "-q")
    few = ("--text", text, "--windows", 4, "--length", 24, "--json")
    exact = json.loads(run("evaluate", narrow, *few).stdout)["compressed"]
    alone = json.loads(run("evaluate", tmp_path / "onnx", *few).stdout)
    assert alone["dense"] is None
    assert alone["compressed"]["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-5)
    pair = json.loads(run("evaluate", tmp_path / "onnx", "--against", narrow, *few).stdout)
    assert pair["dense"]["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-5)
    assert pair["compressed"]["agreement"] == 1 and abs(pair["compressed"]["divergence"]) < 1e-6
    shown = run("evaluate", tmp_path / "onnx", "--against", narrow, *few[:-1]).stdout
    assert "top-1 agreement 100.0%" in shown and "(dense " in shown
    other = make_checkpoint(tmp_path / "other", "llama", vocab_size=128)
    (other / "tokenizer.json").write_bytes((narrow / "tokenizer.json").read_bytes())
    done = run("evaluate", tmp_path / "onnx", "--against", other, *few, code=2)
    assert "different vocabularies" in done.stderr


# export


def test_the_json_of_a_quantised_graph_says_what_it_holds(narrow, text, tmp_path):
    flags = ("--format", "int4", "--text", text, "--windows", 8)
    found = json.loads(run("export", narrow, *flags, "-o", tmp_path / "onnx", "--json").stdout)["weights"]
    assert (found["format"], found["method"], found["block"], found["symmetric"]) == ("int4", "gptq", 32, False)
    assert {found["ends"]["head"], found["ends"]["embedding"]} <= {4, 8}
    assert found["ends"]["measured"]["layers"] > 0


def test_a_graph_for_ascend_says_how_it_is_run(wide, tmp_path):
    run("export", wide, "--profile", "ascend-310b1", "--static", "-o", tmp_path / "om", "--quiet")
    done = run("generate", tmp_path / "om", "w5 w6", "--new", 2, code=2)
    assert f"{tmp_path}/om/run_om.py --onnx" in done.stderr


def test_the_profile_names_the_target(wide, tmp_path):
    run("export", wide, "--profile", "ascend-310b4", "-o", tmp_path / "om", "--quiet")
    assert (tmp_path / "om/build_om.sh").is_file()
    run("export", wide, "--profile", "ascend-910b3", "-o", tmp_path / "hf", "--quiet")
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    done = run("export", wide, "--profile", "cpu-avx2", "--method", "nearest", "-o", tmp_path / "onnx")
    assert "Format int4, the fastest on cpu-avx2" in done.stderr
    run("check-ascend", tmp_path / "om")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gears", "1,8"), ("--gears is for --target ascend-om, not onnx",)),
        (("--target", "uniform", "--format", "int4"), ("--format is for --target onnx or ascend-om or ascend-hf",)),
        (("--target", "ascend-om", "--ends", "4"), ("--ends is for --target onnx",)),
        (("--target", "ascend-om"), ("needs the chip",)),
        (("--target", "ascend-hf"), ("--soc-version",)),
        (("--target", "ascend-hf", "--soc-version", "Ascend310P"), ("Ascend310P",)),
        (("--profile", "ascend-310b1", "--soc-version", "Ascend910B2"), ("not a chip of the profile",)),
        (("--profile", "ascend-310p3", "--dtype", "bfloat16"), ("no bfloat16",)),
        (("--profile", "ascend-310b1", "--format", "bf16"), ("not written for an OM",)),
        (("--profile", "ascend-310b1", "--gears", "8,1"), ("gears",)),
        (("--profile", "ascend-310p3", "--format", "w4a4"), ("w4a4 is not one of",)),
        (("--profile", "ascend-910b2", "--devices", "2"), ("cannot be split over 2 devices",)),
        (("--profile", "ascend-310p3", "--soc-version", "Ascend910B2"), ("not a chip of the profile",)),
        (("--target", "ascend-hf", "--profile", "nosuch"), ("nosuch",)),
        (("--profile", "ascend-910b2", "--format", "w8a8-dynamic", "--method", "search"), ("--method search",)),
        (("--profile", "ascend-910b2", "--smooth", "0.9", "--pure"), ("--smooth and --pure would do nothing",)),
        (("--profile", "ascend-910b2", "--text", "words.txt"), ("--text would do nothing",)),
        (("--profile", "ascend-910b2", "--format", "w8a8-dynamic", "--pure"), ("--pure would do nothing",)),
        (("--profile", "cpu-avx2", "--target", "uniform"), ("means nothing to --target uniform",)),
        (("--profile", "ascend-310b1", "--target", "onnx"), ("ascend-310b1 runs ascend-om",)),
        (("--profile", "nosuch", "--target", "onnx", "--format", "int8"), ("nosuch",)),
        (("--profile", "ascend-310b1", "--format", "fp32", "--precision", "fp16"), ("--precision fp16",)),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(flags, words, wide, tmp_path):
    done = run("export", wide, *flags, "-o", tmp_path / "out", code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", [("--target", "onnx"), ("--profile", "ascend-310b1"), ("--profile", "ascend-910b2")])
def test_a_checkpoint_or_place_that_is_no_good_is_one_sentence(target, wide, tmp_path):
    refused(run("export", wide, *target, "-o", "/proc/nowhere/out", code=2), "cannot be written")
    broken = make_model(tmp_path / "broken", "qwen3")
    (broken / "tokenizer.json").write_text("{}")
    refused(run("export", broken, *target, "-o", tmp_path / "out", code=2), "tokenizer.json")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    (broken / "tokenizer.json").unlink()
    save_file(tensors, broken / "model.safetensors")
    refused(run("export", broken, *target, "-o", tmp_path / "out", "-q", code=2), "model.layers.2.mlp.up_proj.weight")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def refused(done, words):
    assert done.stdout == "" and words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr

"""Reading and writing checkpoint folders: exactness, laziness, crash safety, and one sentence per refusal."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused as assert_refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress import checkpoint, checkpoint_source, checkpoint_writer
from compress.checkpoint import TensorInfo, check_finite, open_checkpoint
from compress.checkpoint_writer import CheckpointWriter, check_kept, check_output, check_space, remove_folder
from compress.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = {"model_type": "tiny", "hidden_size": 4}
INDEX = "model.safetensors.index.json"


def draw_tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=draw)
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    integers = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    found = {f"x.{dtype}".replace("torch.", ""): values.to(dtype) for dtype in floats}
    found |= {f"n.{dtype}".replace("torch.", ""): (values * 9).abs().to(dtype) for dtype in integers}
    # Three bytes between wider items: a writer that ignores alignment makes a file that does not open.
    return {"flag": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 5), **found}


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 2**31, **options: Any) -> Path:
    with CheckpointWriter(folder, CONFIG, shard_bytes, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish()


def make_source(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder made by the safetensors library, so that the reader is not tested against our own writer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(draw_tensors() if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_sharded(folder: Path) -> Path:
    make_source(folder)
    (folder / "model.safetensors").unlink()
    tensors = draw_tensors()
    mapping = {}
    for number, names in enumerate((list(tensors)[:5], list(tensors)[5:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        mapping |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}))
    return folder


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Reading


@pytest.mark.parametrize("make", [make_source, make_sharded])
def test_reads_what_the_safetensors_library_wrote(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    found = open_checkpoint(make(tmp_path / "in"))
    assert found.config == CONFIG
    assert_same(found.read(found.tensors), draw_tensors())
    assert found.nbytes == sum(tensor.nbytes for tensor in draw_tensors().values())
    order = [(info.file, info.name) for info in found.tensors.values()]
    assert order == sorted(order)


def test_scans_the_shards_without_an_index(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "in")
    (folder / INDEX).unlink()
    found = open_checkpoint(str(folder))
    assert_same(found.read(found.tensors), draw_tensors())


def test_a_lone_model_file_goes_before_the_index_of_others(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "in")
    save_file({"only": torch.ones(2)}, folder / "model.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["only"]


def test_reads_in_the_order_asked_and_casts(tmp_path: Path) -> None:
    found = open_checkpoint(make_source(tmp_path / "in"))
    names = ["x.float64", "x.bfloat16", "flag"]
    read = found.read(iter(names), torch.float32)
    assert list(read) == names
    assert_same(read, {name: draw_tensors()[name].to(torch.float32) for name in names})
    assert torch.equal(found.read_one("x.float16"), draw_tensors()["x.float16"])
    with pytest.raises(KeyError, match="absent"):
        found.read(["absent"])


def test_casts_and_counts_in_parts_like_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "STEP", 4)
    found = open_checkpoint(make_source(tmp_path / "in"))
    assert torch.equal(found.read_one("x.float64", torch.float32), draw_tensors()["x.float64"].float())
    check_finite(found)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("name", ["x.float64", "x.bfloat16"])
def test_rows_and_slices_equal_indexing(tmp_path: Path, name: str, dtype: torch.dtype | None) -> None:
    found = open_checkpoint(make_source(tmp_path / "in"))
    stored = load_file(found.folder / "model.safetensors")[name]
    whole = stored.to(dtype or stored.dtype)
    rows = torch.tensor([6, 0, 3, 3, 0])
    assert_same({"x": found.read_rows(name, rows, dtype)}, {"x": whole[rows]})
    assert_same({"x": found.read_rows(name, rows[:0], dtype)}, {"x": whole[:0]})
    for start, stop in ((0, 7), (2, 5), (4, 4)):
        assert_same({"x": found.read_slice(name, start, stop, dtype)}, {"x": whole[start:stop]})


def test_rows_outside_the_tensor_are_refused(tmp_path: Path) -> None:
    found = open_checkpoint(make_source(tmp_path / "in"))
    for rows in ([7], [-1]):
        with pytest.raises(IndexError, match=r"0 \.\. 6"):
            found.read_rows("x.float32", torch.tensor(rows))
    for start, stop in ((-1, 2), (0, 8), (3, 2)):
        with pytest.raises(IndexError):
            found.read_slice("x.float32", start, stop)


def test_tensors_are_fresh_memory(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "in")
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    found = open_checkpoint(folder)
    first = found.read_one("x.float32")
    first.zero_()
    assert torch.equal(found.read_one("x.float32"), draw_tensors()["x.float32"])
    assert found.sha256()["model.safetensors"] == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_no_shard_stays_mapped_or_open(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "in")
    file = str(folder / "model.safetensors")
    with safe_open(file, "pt") as mapped:
        assert mapped.keys()
        assert file in Path("/proc/self/maps").read_text()  # the check itself can see a mapping
    found = open_checkpoint(folder)
    kept = [found.read(found.tensors), found.read_rows("x.float32", torch.tensor([1]))]
    check_finite(found)
    assert kept
    assert file not in Path("/proc/self/maps").read_text()
    assert file not in {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}


MEASURE = """
import resource, sys, torch
from compress.checkpoint import check_finite, open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
found = open_checkpoint(sys.argv[1])
found.read_one("warm", torch.float32)
before = peak()
if sys.argv[2] == "each":
    for name in found.tensors:
        found.read_one(name, torch.float32)
elif sys.argv[2] == "rows":
    found.read_rows("w0", torch.arange(0, 4096, 64))
else:
    check_finite(found)
print(peak() - before)
"""


@pytest.mark.parametrize(("job", "bound"), [("each", 2.6), ("rows", 0.5), ("finite", 1.6)])
def test_the_peak_does_not_grow_with_what_was_read(tmp_path: Path, job: str, bound: float) -> None:
    one = 4096 * 4096 * 2
    tensors = {f"w{number}": torch.ones(4096, 4096, dtype=torch.bfloat16) for number in range(6)}
    folder = make_source(tmp_path / "in", {"warm": torch.ones(4, dtype=torch.bfloat16), **tensors})
    run = run_python(MEASURE, folder, job)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < bound * one + 24 * 2**20


def test_hashes_config_and_every_weight_file(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "in")
    names = ["config.json", *sorted(path.name for path in folder.glob("*.safetensors"))]
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    assert open_checkpoint(folder).sha256() == expected


def test_side_files_leave_out_weights_code_and_pickles(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "in")
    wanted = ["chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
    wanted += ["special_tokens_map.json", "tokenizer_config.json", "vocab.json", "preprocessor_config.json"]
    for name in [*wanted, "tokenizer_x.py", "tokenizer.bin", "tokenizer.pt", "README.md", "training_args.bin"]:
        (folder / name).write_text("{}")
    (folder / "tokenizer_parts").mkdir()
    assert [path.name for path in open_checkpoint(folder).side_files()] == sorted(wanted)


def test_tensor_info_states_its_size() -> None:
    assert TensorInfo("w", (3, 4), torch.bfloat16, Path("f")).nbytes == 24


# Refusals


def cut_tail(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def replace_weights(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(data) and None


def set_config(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **keys})) and None


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def add_tensor(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: save_file({name: torch.ones(4, 4).to(dtype)}, folder / "model.safetensors")


def turn_into_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def grow_file(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")


def build_header(entries: object, tail: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + tail


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
WRONG_SHAPE = {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
ODD_DTYPE = {"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}
FP4 = {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["config.json", "Hugging Face"]),
        (write_text("config.json", '{"a": 1,\n"b" 2}'), ["config.json", "valid JSON", "line 2"]),
        (write_text("config.json", "[1]"), ["config.json", "JSON object"]),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00") and None, ["valid JSON"]),
        (turn_into_pickle, ["pytorch_model.bin", "pickled", "safetensors"]),
        (drop_weights, ["no *.safetensors weights"]),
        (cut_tail, ["model.safetensors", "truncated", "9 bytes"]),
        (replace_weights(b"abc"), ["truncated"]),
        (replace_weights((2**40).to_bytes(8, "little") + b"{}"), ["truncated"]),
        (replace_weights((3).to_bytes(8, "little") + b"{,}"), ["corrupt"]),
        (replace_weights(build_header([1])), ["corrupt"]),
        (replace_weights(build_header({"w": {"dtype": "F32"}})), ["corrupt"]),
        (replace_weights(build_header(WRONG_SHAPE, bytes(8))), ["corrupt"]),
        (replace_weights(build_header(ODD_DTYPE, bytes(8))), ["C64", "not supported"]),
        (replace_weights(build_header(FP4, bytes(1))), ["already quantised", "F4"]),
        (grow_file, ["corrupt", "size"]),
        (replace_weights(LFS.encode()), ["Git LFS", "git lfs pull"]),
        (write_text("tokenizer.json", LFS), ["tokenizer.json", "Git LFS"]),
        (set_config(quantization_config={"quant_method": "gptq"}), ["already quantised", "gptq"]),
        (set_config(quantization_config={"quant_method": "awq"}), ["already quantised", "awq"]),
        (set_config(quantization_config={"quant_method": "fp8"}), ["already quantised", "fp8"]),
        (set_config(text_config={"quantization_config": {"quant_method": "awq"}}), ["already quantised", "awq"]),
        (set_config(compression_config={"format": "int-quantized"}), ["already quantised", "int-quantized"]),
        (add_tensor("a.weight", torch.float8_e4m3fn), ["already quantised", "F8_E4M3"]),
        (add_tensor("a.weight", torch.int8), ["already quantised", "a.weight", "int8"]),
        (add_tensor("a.qweight", torch.int32), ["already quantised", "a.qweight"]),
        (add_tensor("a.weight_scale", torch.float32), ["already quantised", "a.weight_scale"]),
    ],
)
def test_refuses_with_one_sentence(tmp_path: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    folder = make_source(tmp_path / "in")
    open_checkpoint(folder)  # sound before the damage
    damage(folder)
    assert_refused(lambda: open_checkpoint(folder), str(folder), *words)


def test_accepts_a_null_quantisation_key(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "in")
    set_config(quantization_config=None)(folder)
    assert open_checkpoint(folder).tensors


def break_index(folder: Path, **changes: str) -> None:
    parsed = json.loads((folder / INDEX).read_text())
    parsed["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(parsed))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), ["model-00002", "lacks the shard"]),
        (lambda folder: break_index(folder, ghost="model-00001-of-00002.safetensors"), ["ghost", "not in"]),
        (write_text(INDEX, "{}"), ["weight_map"]),
        (write_text(INDEX, "{"), ["valid JSON"]),
        (write_text("model-00001-of-00002.safetensors", LFS), ["Git LFS"]),
    ],
)
def test_refuses_damaged_shards(tmp_path: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    folder = make_sharded(tmp_path / "in")
    damage(folder)
    assert_refused(lambda: open_checkpoint(folder), str(folder), *words)


def test_refuses_unindexed_shards_that_are_incomplete_or_overlap(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "in")
    (folder / INDEX).unlink()
    save_file({"flag": torch.ones(1)}, folder / "other.safetensors")
    assert_refused(lambda: open_checkpoint(folder), "flag", "other.safetensors")
    (folder / "other.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert_refused(lambda: open_checkpoint(folder), "1 of 2 shards")


def test_refuses_missing_folders_and_files(tmp_path: Path) -> None:
    assert_refused(lambda: open_checkpoint(tmp_path / "absent"), str(tmp_path / "absent"), "no folder", "hub id")
    folder = make_source(tmp_path / "in")
    assert_refused(lambda: open_checkpoint(folder / "model.safetensors"), "is a file")


def test_a_read_error_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_source(tmp_path / "in")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_source, "refuse_lfs_pointer", refuse)
    assert_refused(lambda: open_checkpoint(folder), "config.json", "Permission denied")


def test_a_shard_that_shrinks_later_is_one_sentence(tmp_path: Path) -> None:
    found = open_checkpoint(make_source(tmp_path / "in", {"w": torch.ones(9)}))
    cut_tail(found.folder)
    assert_refused(lambda: found.read_one("w"), "ended inside tensor w")


def test_names_the_first_tensor_that_is_not_finite(tmp_path: Path) -> None:
    bad = torch.ones(3, 4, dtype=torch.bfloat16)
    bad[0, 1], bad[2, 0], bad[2, 3] = float("nan"), float("inf"), float("-inf")
    found = open_checkpoint(make_source(tmp_path / "in", {"a": torch.ones(2), "b": bad, "c": bad.float()}))
    assert_refused(lambda: check_finite(found), "Tensor b", "3 NaN or infinite values out of 12", "model.safetensors")
    assert_refused(lambda: check_finite(found, ["c"]), "Tensor c")
    check_finite(found, ["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 50, 99])
def test_sees_one_bad_value_anywhere(tmp_path: Path, value: float, dtype: torch.dtype, place: int) -> None:
    tensor = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)  # whose sum overflows without being at fault
    folder = make_source(tmp_path / "good", {"w": tensor})
    check_finite(open_checkpoint(folder))
    tensor[place] = value
    found = open_checkpoint(make_source(tmp_path / "bad", {"w": tensor}))
    assert_refused(lambda: check_finite(found), "1 NaN")


# The hub


def test_a_hub_id_that_is_not_cached_is_one_sentence_offline(tmp_path: Path) -> None:
    code = "import sys; from compress.checkpoint import open_checkpoint; open_checkpoint('org/never-there')"
    run = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"))
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("compress.errors.UserError: There is no folder org/never-there, and HF_HUB_OFFLINE is set")


def test_a_cached_hub_id_opens_offline(tmp_path: Path) -> None:
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--org--tiny"
    make_source(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = "from compress.checkpoint import open_checkpoint; print(open_checkpoint('org/tiny').nbytes)"
    run = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"))
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == sum(tensor.nbytes for tensor in draw_tensors().values())


def make_hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    return kind.__new__(kind)  # the constructors want an HTTP response, which nothing here reads


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RepositoryNotFoundError", ["no model org/name", "hf auth login"]),
        ("GatedRepoError", ["gated", "hf auth login"]),
        ("LocalEntryNotFoundError", ["could not be downloaded", "network"]),
        ("HfHubHTTPError", ["could not be downloaded", "HfHubHTTPError"]),
    ],
)
def test_hub_errors_become_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise make_hub_error(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert_refused(lambda: open_checkpoint("org/name"), "org/name", *words)


def test_the_hub_download_takes_no_pickles_code_or_subfolders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, list[str]] = {}

    def note(_: str, **patterns: list[str]) -> str:
        asked.update(patterns)
        return str(make_source(tmp_path / "in"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", note)
    assert open_checkpoint("org/name").tensors
    files = ["config.json", "model.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "modeling.py", "original/a.safetensors", "onnx/b.json", "consolidated.safetensors"]
    assert list(filter_repo_objects([*files, *unwanted], **asked)) == files


# Writing


@pytest.mark.parametrize("shard_bytes", [2**31, 300, 1])
def test_round_trip_of_every_dtype(tmp_path: Path, shard_bytes: int) -> None:
    folder = write_folder(tmp_path / "out", draw_tensors(), shard_bytes)
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        loaded |= load_file(file)
    assert_same({name: loaded[name] for name in draw_tensors()}, draw_tensors())
    found = open_checkpoint(folder)
    assert found.config == CONFIG
    assert_same({name: found.read_one(name) for name in draw_tensors()}, draw_tensors())
    assert all(info.offset % info.dtype.itemsize == 0 for info in found.tensors.values())
    assert list_names(tmp_path) == {"out"}


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    assert list_names(write_folder(tmp_path / "out", draw_tensors())) == {"config.json", "model.safetensors"}


def test_shards_and_index_are_what_loaders_expect(tmp_path: Path) -> None:
    tensors = {f"w{number}": torch.full((10,), float(number)) for number in range(5)}
    folder = write_folder(tmp_path / "out", tensors, shard_bytes=80)
    files = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert list_names(folder) == {"config.json", INDEX, *files}
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    held = {file: set(load_file(folder / file)) for file in files}
    assert held == {files[0]: {"w0", "w1"}, files[1]: {"w2", "w3"}, files[2]: {"w4"}}
    assert index["weight_map"] == {name: file for file, names in held.items() for name in names}


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "big": torch.ones(100), "b": torch.ones(2)}
    folder = write_folder(tmp_path / "out", tensors, shard_bytes=64)
    assert set(load_file(folder / "model-00002-of-00003.safetensors")) == {"big"}


@pytest.mark.parametrize(
    ("tensors", "fits"),
    [
        ({f"w{number}": torch.randn(4096) for number in range(3)}, True),
        ({f"w{number}": torch.randn(16) for number in range(99)}, False),
        ({"w0": torch.randn(4096), "w1": torch.randn(4095).bfloat16()}, False),
    ],
    ids=["plain", "long header", "mixed"],
)
def test_a_large_shard_gets_its_header_in_the_room_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor], fits: bool
) -> None:
    monkeypatch.setattr(checkpoint_writer, "HEADER_ROOM", 2048)
    monkeypatch.setattr(checkpoint_writer, "ROOM_SHARE", 2)
    folder = write_folder(tmp_path / "out", tensors)
    assert_same(load_file(folder / "model.safetensors"), tensors)
    assert list_names(folder) == {"config.json", "model.safetensors"}
    offset = open_checkpoint(folder).tensors["w0"].offset
    assert (offset == 2048) == fits


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tied = torch.nn.Parameter(base.clone())
    views = {"t": base.t(), "cut": base[1:3, ::2], "wide": torch.ones(1).expand(5), "p": tied, "q": tied}
    folder = write_folder(tmp_path / "out", views)
    assert_same(load_file(folder / "model.safetensors"), {name: view.detach() for name, view in views.items()})


def test_transformers_opens_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=16
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with CheckpointWriter(tmp_path / "out", model.config.to_dict(), shard_bytes=2000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        writer.finish()
    again, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


def test_files_and_texts_land_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "blob")
    with CheckpointWriter(tmp_path / "out", CONFIG) as writer:
        writer.add("w", torch.ones(2))
        writer.add_file(tmp_path / "tokenizer.json")
        writer.add_text("lightpress.json", '{"seed": 0}')
        (writer.work / "onnx").mkdir()
        (writer.work / "onnx" / "model.onnx").write_bytes(b"graph")
        folder = writer.finish()
    assert not (folder / "tokenizer.json").is_symlink()
    assert json.loads((folder / "lightpress.json").read_text()) == {"seed": 0}
    assert (folder / "onnx" / "model.onnx").read_bytes() == b"graph"


def test_misuse_is_a_value_error(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", CONFIG) as writer:
        with pytest.raises(ValueError, match="no tensor"):
            writer.finish()
        writer.add("w", torch.ones(2))
        with pytest.raises(ValueError, match="twice"):
            writer.add("w", torch.ones(2))
        with pytest.raises(ValueError, match="complex64"):
            writer.add("z", torch.ones(2, dtype=torch.complex64))
    assert list_names(tmp_path) == set()


WRITE_MUCH = """
import resource, sys, torch
from pathlib import Path
from compress.checkpoint_writer import CheckpointWriter
with CheckpointWriter(Path(sys.argv[1]), {}) as writer:
    writer.add("warm", torch.ones(8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(int(sys.argv[2])):
        writer.add(f"w{number}", torch.ones(2048, 4096))
    writer.finish()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_writing_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    run = run_python(WRITE_MUCH, tmp_path / "out", 6)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 2.5 * 2048 * 4096 * 4


# Crashes


def test_an_exception_or_a_missing_finish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), CheckpointWriter(tmp_path / "out", CONFIG, 64) as writer:
        for number in range(4):
            writer.add(f"w{number}", torch.ones(10))
        assert writer.work.is_dir()
        raise RuntimeError("boom")
    assert list_names(tmp_path) == set()
    with CheckpointWriter(tmp_path / "out", CONFIG) as writer:
        writer.add("w", torch.ones(10))
    assert list_names(tmp_path) == set()


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from compress import checkpoint_writer
from compress.checkpoint_writer import CheckpointWriter
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] != "add":
    setattr(checkpoint_writer, sys.argv[2], die)
with CheckpointWriter(Path(sys.argv[1]), {"model_type": "tiny"}, 64, overwrite=True) as writer:
    for number in range(5):
        writer.add(f"w{number}", torch.ones(10))
    if sys.argv[2] == "add":
        die()
    writer.finish()
"""


@pytest.mark.parametrize(("moment", "replaces"), [("add", False), ("_encode_header", True), ("_sync_tree", True)])
def test_a_killed_writer_leaves_no_valid_looking_folder(tmp_path: Path, moment: str, replaces: bool) -> None:
    target = tmp_path / "out"
    if replaces:
        write_folder(target, {"old": torch.ones(3)})
    run = run_python(KILLED, target, moment)
    assert run.returncode == -signal.SIGKILL
    assert target.exists() == replaces
    if replaces:
        assert_same(load_file(target / "model.safetensors"), {"old": torch.ones(3)})
    left = list_names(tmp_path) - {"out"}
    assert len(left) == 1
    assert left.pop().startswith(".out.partial-")
    for folder in tmp_path.glob(".out*"):
        assert_refused(lambda folder=folder: open_checkpoint(folder), "config.json")


def test_a_left_over_sibling_of_the_same_process_id_is_cleared(tmp_path: Path) -> None:
    stale = tmp_path / f".out.partial-{os.getpid()}"
    stale.mkdir()
    (stale / "junk").write_text("x")
    assert list_names(write_folder(tmp_path / "out", {"w": torch.ones(1)})) == {"config.json", "model.safetensors"}


def fill_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["_encode_header", "sync_path", "_move_into_place"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(checkpoint_writer, step, fill_disk)
    assert_refused(lambda: write_folder(tmp_path / "out", draw_tensors()), str(tmp_path / "out"), "full", "free some")
    assert list_names(tmp_path) == set()


def test_the_operating_systems_write_error_is_caught_too(tmp_path: Path) -> None:
    """A real failing write, with its failing flush on close: a file size limit stands in for a full disk."""
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from compress import checkpoint_writer as module\n"
        "import errno; module.DISK_FULL = (errno.EFBIG,)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "with module.CheckpointWriter(Path(sys.argv[1]), {}) as writer:\n"
        "    for number in range(99): writer.add(str(number), torch.ones(100))\n"
    )
    run = run_python(code, tmp_path / "out")
    assert "compress.errors.UserError: The disk of" in run.stderr.strip().splitlines()[-1]
    assert list_names(tmp_path) == set()


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(lambda: write_folder(tmp_path / "file" / "out", draw_tensors()), "cannot be written", "choose")


def test_errors_about_other_files_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), CheckpointWriter(tmp_path / "out", CONFIG) as writer:
        writer.add_file(tmp_path / "outer.json")
    assert list_names(tmp_path) == set()


# Where it may write


def test_refuses_outputs_that_would_destroy_something(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in")
    (tmp_path / "link").symlink_to(source)
    assert_refused(lambda: CheckpointWriter(source / "out", CONFIG, source=source), "input folder")
    for target in (source, source / "out", tmp_path / "link" / "out", tmp_path / "in" / ".." / "in"):
        assert_refused(lambda target=target: check_output(target, source, overwrite=True), "input folder", "choose")
    nested = make_source(tmp_path / "nest" / "in")
    shutil.copy(nested / "config.json", tmp_path / "nest" / "config.json")
    assert_refused(lambda: check_output(tmp_path / "nest", nested, overwrite=True), "input folder")
    (tmp_path / "file").write_text("")
    assert_refused(lambda: check_output(tmp_path / "file"), "is a file")
    assert_refused(lambda: check_output(Path("/")), "/", "choose")
    check_output(tmp_path / "in2", source)
    check_output(tmp_path / "absent" / "out", source)


def test_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    target = write_folder(tmp_path / "out", {"old": torch.ones(3)})
    assert_refused(lambda: write_folder(target, {"new": torch.ones(3)}), str(target), "not empty")
    assert list(open_checkpoint(target).tensors) == ["old"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert open_checkpoint(write_folder(tmp_path / "out", {"w": torch.ones(1)})).tensors
    assert list_names(tmp_path) == {"out"}


def test_overwriting_never_touches_other_folders(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert_refused(lambda: write_folder(tmp_path / "out", draw_tensors(), overwrite=True), "not overwritten")
    assert list_names(tmp_path / "out") == {"thesis.txt"}


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = write_folder(tmp_path / "out", {"old": torch.ones(3)})
    with CheckpointWriter(target, CONFIG, overwrite=True) as writer:
        writer.add("new", torch.ones(3))
        assert list(open_checkpoint(target).tensors) == ["old"]
        writer.finish()
    assert list(open_checkpoint(target).tensors) == ["new"]
    assert list_names(tmp_path) == {"out"}


def test_a_failed_last_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_folder(tmp_path / "out", {"old": torch.ones(3)})
    rename = Path.rename

    def fail_on_new(path: Path, to: Path) -> Path:
        if ".partial-" in path.name and to == target:
            raise OSError(errno.EIO, "Input/output error", str(path), None, str(to))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    assert_refused(lambda: write_folder(target, {"new": torch.ones(3)}, overwrite=True), "Input/output error")
    monkeypatch.undo()
    assert list(open_checkpoint(target).tensors) == ["old"]
    assert list_names(tmp_path) == {"out"}


def test_space_is_checked_where_the_folder_will_be(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there", 1)
    free = shutil.disk_usage(tmp_path).free
    needed = free + 3 * 2**40
    assert_refused(lambda: check_space(tmp_path / "not" / "there", needed), f"{needed / 2**30:.2f} GiB", "free")


def test_overwriting_spares_what_a_run_reads(tmp_path):
    out = tmp_path / "out"
    for inside in (out, out / "text.txt", out / "deep" / "text.txt"):
        with pytest.raises(UserError, match="would delete"):
            check_kept(out, [None, inside])
    check_kept(out, [None, tmp_path / "text.txt", tmp_path])


def test_removed_folder_leaves_nothing(tmp_path):
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "file").write_text("x")
    remove_folder(tmp_path / "run")
    remove_folder(tmp_path / "run")  # a second time there is none
    assert list(tmp_path.iterdir()) == []

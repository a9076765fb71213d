"""Device profiles: those that ship, every refusal of the reader, the rules of shapes by hand, and the commands."""

import copy
import json
import math
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from refusals import refused
from typer.testing import CliRunner

from cli.app import Verbs
from cli.profiles import app
from compress.shapes import LayerShape, ModelShape
from profiles.cost import TYPE_BYTES, Workload, estimate_cost
from profiles.loader import (
    KEYS,
    QUANTISATIONS,
    SECTIONS,
    SHIPPED,
    STORED,
    TEXTS,
    YOURS,
    find_source,
    list_fields,
    list_profiles,
    load_profile,
    parse_profile,
    user_folder,
    write_profile,
)
from profiles.profile import Profile
from profiles.rules import Steps, check_shape, padding_loss, shape_steps

FOLDER = Path(__file__).resolve().parents[1] / "profiles"
NAMES = (
    "ascend-310b1", "ascend-310b4", "ascend-310p3", "ascend-300i-duo", "ascend-910b1", "ascend-910b2", "ascend-910b3",
    "ascend-910b4", "ascend-910b4-1", "ascend-a3", "cpu-avx2", "cpu-avx512", "cpu-amx", "cpu-kunpeng920",
)  # fmt: skip
A2, CPU = "ascend-910b2", "cpu-avx512"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("LIGHTPRESS_PROFILES", str(folder))
    return folder


@pytest.fixture
def data():
    return tomllib.loads((FOLDER / f"{A2}.toml").read_text(encoding="utf-8"))


# What ships


def test_the_asked_profiles_ship():
    assert sorted(NAMES) == [listed.name for listed in list_profiles()]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_loads_and_is_written_back_the_same(name, tmp_path):
    profile = load_profile(name)
    path = tmp_path / f"{name}.toml"
    write_profile(profile, path)
    assert load_profile(path) == profile
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_shipped_profile_has_a_source_and_the_file_begins_with_what_it_is(name):
    profile = load_profile(name)
    assert [key for key, _ in list_fields(profile) if not find_source(profile, key)] == []
    assert (FOLDER / f"{name}.toml").read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_prices_a_model_in_each_of_its_types(name):
    profile, shape = load_profile(name), model(hidden=1024, ffn=3072)
    for weights in profile.formats.weights:
        for activations in profile.formats.activations:
            work = Workload(weights=weights, activations=activations, kv=profile.formats.kv[0])
            assert 0 < estimate_cost(shape, profile, work).total < math.inf
            assert check_shape(shape, profile, work) == []


def test_what_is_known_of_the_chips():
    duo, pro, b4 = load_profile("ascend-300i-duo"), load_profile("ascend-310p3"), load_profile("ascend-910b4")
    assert (duo.link.devices, pro.link.devices) == (2, 1)
    for profile in (duo, pro):
        assert "bf16" not in {*profile.compute.matrix_tflops, *profile.formats.weights, *profile.formats.activations}
        assert "compressed-tensors-w8a8" not in profile.formats.quantisations
    assert (b4.memory.capacity_gib, b4.memory.bandwidth_gb_per_s) == (32, 800)
    for name in NAMES:
        profile = load_profile(name)
        for own, twice in (("fp16", "int8"), ("bf16", "int8")):
            peaks = profile.compute.matrix_tflops
            assert own not in peaks or peaks[twice] == pytest.approx(2 * peaks[own], rel=0.01)
        assert profile.rules.uneven_layers == (profile.runtime.export != "ascend-hf")


def test_keys_and_their_ranges_are_those_of_the_schema():
    declared = {*TEXTS} | {f"{name}.{item.name}" for name, kind in SECTIONS.items() for item in fields(kind)}
    assert set(KEYS) == declared
    assert {item.name for item in fields(Profile)} == {*TEXTS, *SECTIONS, "sources"}
    assert set(STORED) == set(TYPE_BYTES)
    for name, kind in SECTIONS.items():
        for key, hint in get_type_hints(kind).items():
            number = not (hint in (str, bool) or hint == tuple[str, ...])
            assert bool(KEYS[f"{name}.{key}"].unit) == number


# Finding


def write_own(folder, data, name):
    """A file of the user's own: the data under another name."""
    path = folder / f"{name}.toml"
    profile = replace(parse_profile(data, "here"), name=name)
    write_profile(profile, path)
    return path


def test_a_file_of_the_users_own_goes_before_the_packages(own_folder, data):
    data["memory"]["capacity_gib"] = 48
    path = write_own(own_folder, data, A2)
    assert load_profile(A2).memory.capacity_gib == 48
    assert load_profile(FOLDER / f"{A2}.toml").memory.capacity_gib == 64
    same = [listed for listed in list_profiles() if listed.name == A2]
    assert [(listed.path, listed.origin) for listed in same] == [(path, YOURS), (FOLDER / f"{A2}.toml", SHIPPED)]
    assert list_profiles()[0].origin == YOURS


def test_the_users_folder(monkeypatch, tmp_path):
    assert user_folder() == tmp_path / "own"
    monkeypatch.delenv("LIGHTPRESS_PROFILES")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "lightpress" / "profiles"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_folder() == tmp_path / ".config" / "lightpress" / "profiles"


def test_unknown_name_is_refused_with_the_nearest(own_folder):
    words = ("'ascend-910b'", "nearest: 'ascend-910b", "profiles list", str(own_folder))
    refused(lambda: load_profile("ascend-910b"), *words)
    refused(lambda: load_profile("zzz"), "'zzz'", ".toml")


def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "x.toml"
    refused(lambda: load_profile(path), str(path), "No such file")
    path.write_bytes(b"name = '\xff'")
    refused(lambda: load_profile(path), str(path), "UTF-8")
    path.write_text("name = \n", encoding="utf-8")
    refused(lambda: load_profile(path), str(path), "TOML", "line 1")


def test_name_must_be_that_of_the_file(tmp_path, data):
    path = tmp_path / "other.toml"
    path.write_text((FOLDER / f"{A2}.toml").read_text(encoding="utf-8"), encoding="utf-8")
    refused(lambda: load_profile(path), str(path), f"'{A2}'", "'other'")
    refused(lambda: write_profile(parse_profile(data, "here"), tmp_path / "new.toml"), "'new'")
    assert not (tmp_path / "new.toml").exists()


# Refusals of the reader


def change(data, key, value):
    """The data with one value at a dotted key replaced, or taken away where it is None."""
    data = copy.deepcopy(data)
    *path, last = key.split(".")
    table = data
    for part in path:
        table = table[part]
    if value is None:
        del table[last]
    else:
        table[last] = value
    return data


NOT_ACCEPTED = [
    # key, value, words of the sentence
    ("memory.bandwidth_gib_per_s", 1490.0, ("nearest is memory.bandwidth_gb_per_s", "GB/s (10^9 bytes per second)")),
    ("memory.bandwidth", 1600, ("nearest is memory.bandwidth_gb_per_s", "GB/s")),
    ("memory.capacity_gb", 64, ("nearest is memory.capacity_gib", "GiB (2^30 bytes)")),
    ("overhead.matrix_op_ms", 0.01, ("nearest is overhead.matrix_op_us", "us (10^-6 seconds)")),
    ("compute.tflops", 1, ("nearest is compute.matrix_tflops", "TFLOPS")),
    ("bandwidth_gb_per_s", 1600, ("nearest is memory.bandwidth_gb_per_s",)),
    ("compute.capacity_gib", 64, ("nearest is memory.capacity_gib",)),
    ("mem", {"x": 1}, ("nearest is memory",)),
    ("memory.qqqqqq", 1, ("leave it out",)),
    ("memory.bandwidth_gb_per_s", None, ("memory.bandwidth_gb_per_s is missing", "GB/s", "from 2 to 20000")),
    ("runtime", None, ("runtime.name is missing", "a text")),
    ("kind", None, ("kind is missing", "npu, cpu")),
    ("rules.uneven_layers", None, ("rules.uneven_layers is missing", "true or false")),
    ("formats.kv", None, ("formats.kv is missing", "a list of fp32")),
    ("compute.matrix_tflops", None, ("compute.matrix_tflops is missing", "TFLOPS")),
    ("rules.tiles", None, ("rules.tiles is missing", "[K, N]")),
    ("memory", 3, ("memory must be a table", "[memory]")),
    ("name", 3, ("name is 3", "a text")),
    ("description", " ", ("description", "a text")),
    ("kind", "tpu", ("'tpu'", "npu, cpu")),
    ("runtime.export", "tar", ("'tar'", "onnx, ascend-om, ascend-hf")),
    ("rules.uneven_layers", 0, ("rules.uneven_layers is 0", "true or false")),
    ("memory.capacity_gib", "64", ("memory.capacity_gib is '64'", "GiB")),
    ("memory.capacity_gib", True, ("memory.capacity_gib is True", "GiB")),
    ("memory.capacity_gib", math.nan, ("memory.capacity_gib is nan", "GiB")),
    ("memory.capacity_gib", math.inf, ("memory.capacity_gib is inf", "GiB")),
    ("memory.capacity_gib", 0, ("memory.capacity_gib is 0", "GiB")),
    ("memory.capacity_gib", 65536, ("memory.capacity_gib is 65536", "check its unit")),
    ("memory.bandwidth_gb_per_s", -1.0, ("memory.bandwidth_gb_per_s is -1.0", "GB/s")),
    ("memory.bandwidth_gb_per_s", 1.6e12, ("1600000000000.0", "from 2 to 20000, in GB/s", "check its unit")),
    ("memory.bandwidth_gb_per_s", 1.6, ("is 1.6", "check its unit")),
    ("memory.weight_efficiency", 1.1, ("memory.weight_efficiency is 1.1", "from 0.001 to 1 of the bandwidth")),
    ("compute.matrix_efficiency", 70, ("compute.matrix_efficiency is 70", "of the peak")),
    ("compute.overlap", 1.5, ("compute.overlap is 1.5",)),
    ("compute.matrix_tflops.bf16", 3.5e14, ("compute.matrix_tflops.bf16", "TFLOPS")),
    ("compute.matrix_tflops.bf16", "fast", ("compute.matrix_tflops.bf16 is 'fast'", "a number")),
    ("compute.matrix_tflops.fp8", 700, ("compute.matrix_tflops.fp8", "fp32, fp16, bf16, int8")),
    ("compute.matrix_tflops", 354, ("compute.matrix_tflops is 354", "table")),
    ("compute.matrix_tflops", {}, ("compute.matrix_tflops is {}", "table")),
    ("link.devices", 8.0, ("link.devices is 8.0", "whole number")),
    ("link.devices", 0, ("link.devices is 0",)),
    ("rules.width_multiple", 0, ("rules.width_multiple is 0", "channels")),
    ("rules.tiles.fp16", [16], ("rules.tiles.fp16", "two whole numbers")),
    ("rules.tiles.fp16", [16, 1.5], ("rules.tiles.fp16 is 1.5", "whole number")),
    ("rules.tiles.fp16", [16, 0], ("rules.tiles.fp16 is 0",)),
    ("rules.tiles.int2", [16, 16], ("rules.tiles.int2", "int4")),
    ("formats.weights", "bf16", ("formats.weights is 'bf16'", "a list")),
    ("formats.weights", [], ("formats.weights is []",)),
    ("formats.weights", ["bf16", "fp8"], ("fp8", "a list of")),
    ("formats.kv", ["fp16", "fp16"], ("formats.kv", "at most once")),
    ("formats.activations", ["int4"], ("int4", "fp32, fp16, bf16, int8")),
    ("formats.quantisations", ["awq"], ("awq", "w8a8-static")),
    ("formats.weights", ["fp32", "int8"], ("formats.weights has fp32", "matrix_tflops.fp32 in TFLOPS")),
    ("formats.activations", ["fp32"], ("formats.activations has fp32", "matrix_tflops.fp32")),
    ("formats.activations", ["int8", "bf16"], ("begins with int8",)),
    ("rules.tiles.int8", None, ("rules.tiles.int8 is missing", "[K, N]")),
    ("formats.quantisations", ["int4"], ("has int4", "needs int4 weights")),
    ("formats.weights", ["bf16"], ("w8a8-dynamic", "needs int8 weights and int8 activations")),
    ("formats.activations", ["bf16"], ("w8a8-dynamic", "needs int8 weights and int8 activations")),
    ("memory.cache_gb_per_s", 0, ("memory.cache_mib", "both")),
    ("link.bandwidth_gb_per_s", 0, ("link.bandwidth_gb_per_s is 0", "GB/s", "devices = 1")),
    ("sources", "a book", ("sources must be a table",)),
    ("sources.memory", {"cache_mib": "x"}, ("unquoted point", '"memory.cache_mib"')),
    ("sources.overhead", "", ("sources.overhead", '"estimate"')),
    ("sources.overhead", 3, ("sources.overhead is 3",)),
    ("sources.overhad", "estimate", ("sources.overhad", "nearest is overhead")),
    ("sources.overhead", None, ("overhead.matrix_op_us has no source", '"overhead"', '"estimate"')),
    ("sources", None, ("has no source",)),
]


@pytest.mark.parametrize(("key", "value", "words"), NOT_ACCEPTED, ids=lambda value: str(value)[:40])
def test_mistakes_are_refused_in_one_sentence(data, key, value, words):
    wrong = change(data, key, value)
    refused(lambda: parse_profile(wrong, "here.toml"), "here.toml: ", *words)


def test_a_wrong_entry_among_the_sources_is_refused(data):
    for name in ("memory.cache_gib", "compute.matrix_tflops.int4", "memory.cache_mib.fp16", "rules.tiles.x"):
        data["sources"] = {**data["sources"], name: "estimate"}
        refused(lambda: parse_profile(data, "here"), f"sources.{name}")
        del data["sources"][name]


def test_one_number_without_a_source_is_enough(data):
    del data["sources"]["memory.cache_mib"]
    refused(lambda: parse_profile(data, "here"), "memory.cache_mib has no source")
    data["sources"]["memory"] = "the section's source holds for every key that has none of its own"
    profile = parse_profile(data, "here")
    assert find_source(profile, "memory.cache_mib") == data["sources"]["memory"]
    assert find_source(profile, "memory.capacity_gib") == data["sources"]["memory.capacity_gib"]


def test_an_entry_of_a_table_may_have_a_source_of_its_own(data):
    data["sources"]["compute.matrix_tflops.int8"] = "own"
    profile = parse_profile(data, "here")
    assert find_source(profile, "compute.matrix_tflops.int8") == "own"
    assert find_source(profile, "compute.matrix_tflops.fp16") == data["sources"]["compute.matrix_tflops"]


def test_zero_stands_for_none_only_where_it_may(data):
    for key in ("memory.cache_mib", "memory.cache_gb_per_s", "overhead.matrix_op_us", "overhead.step_us"):
        data = change(data, key, 0)
    assert parse_profile(data, "here").memory.cache_mib == 0
    refused(lambda: parse_profile(change(data, "memory.cache_mib", 0.001), "here"), "or 0, in MiB")


def test_each_quantisation_is_known_by_its_types():
    for weights, activations in QUANTISATIONS.values():
        assert weights in STORED
        assert activations in ("", *STORED)


# Writing


def test_odd_texts_survive_writing(tmp_path, data):
    text = 'quote " backslash \\ tab \t line \n delete \x7f \u00e9 \U0001f600 # [x]'
    profile = replace(parse_profile(data, "here"), description=text, sources={**data["sources"], "memory": text})
    path = tmp_path / "deep" / "folder" / f"{A2}.toml"
    write_profile(profile, path)
    assert load_profile(path) == profile


def test_a_profile_that_cannot_be_read_back_is_not_written(tmp_path, data):
    path = tmp_path / f"{A2}.toml"
    profile = parse_profile(data, "here")
    write_profile(profile, path)
    before = path.read_bytes()
    bad = replace(profile, memory=replace(profile.memory, bandwidth_gb_per_s=math.inf))
    refused(lambda: write_profile(bad, path), str(path), "memory.bandwidth_gb_per_s is inf")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]


# Rules: expected values are worked out by hand


def layer(**sizes):
    return LayerShape(**{"query_heads": 16, "kv_heads": 8, "head_dim": 128, "ffn": 3072, **sizes})


def model(hidden=2048, vocab=4096, layers=2, **sizes):
    return ModelShape(vocab, hidden, tied=False, layers=(layer(**sizes),) * layers)


def work(**values):
    return Workload(**{"weights": "bf16", "activations": "bf16", "kv": "bf16", **values})


STEPS = [
    # hidden, ffn, kv heads of the dense shape, devices, weights -> steps
    ((4096, 12288, 8), 1, "bf16", Steps(128, 128, 1)),
    ((4096, 12288, 8), 2, "bf16", Steps(128, 256, 2)),
    ((4096, 12288, 8), 4, "bf16", Steps(128, 512, 4)),
    ((4096, 12288, 8), 8, "bf16", Steps(128, 1024, 8)),
    # 8 x 128 is large, one below is not; nor is what is no multiple of 128
    ((1024, 1024, 8), 1, "bf16", Steps(128, 128, 1)),
    ((896, 896, 8), 1, "bf16", Steps(16, 16, 1)),
    ((1040, 1040, 8), 1, "bf16", Steps(16, 16, 1)),
    # after a split over two, 1024 channels are 512 each: below 8 x 128
    ((1024, 1024, 8), 2, "bf16", Steps(128, 32, 2)),
    # int8: K in steps of 32
    ((896, 896, 8), 1, "int8", Steps(32, 32, 1)),
    ((896, 896, 8), 4, "int8", Steps(32, 128, 4)),
    # fewer KV heads than devices are copied: 16 query heads over 8 devices, in groups of 4 two KV heads fill them
    ((896, 896, 4), 8, "bf16", Steps(16, 128, 2)),
    # groups of 16 query heads divide by themselves
    ((896, 896, 1), 8, "bf16", Steps(16, 128, 1)),
    # 3 KV heads neither divide nor help
    ((896, 896, 3), 2, "bf16", Steps(16, 32, 1)),
]


@pytest.mark.parametrize(("sizes", "devices", "weights", "expected"), STEPS)
def test_steps_of_counts(sizes, devices, weights, expected):
    hidden, ffn, kv = sizes
    shape = model(hidden=hidden, ffn=ffn, query_heads={3: 9}.get(kv, 16), kv_heads=kv)
    assert shape_steps(load_profile(A2), work(weights=weights, devices=devices), shape) == expected


def test_steps_of_a_shape_with_uneven_layers_hold_for_every_layer():
    shape = ModelShape(4096, 2048, False, (layer(ffn=3072, kv_heads=8), layer(ffn=2064, kv_heads=4)))
    assert shape_steps(load_profile(A2), work(devices=4), shape) == Steps(128, 64, 4)


def test_steps_on_a_cpu_and_of_a_quantised_head():
    shape = model(hidden=120, ffn=200)
    cpu = load_profile(CPU)
    plain = Workload(weights="fp32", activations="fp32", kv="fp32")
    assert shape_steps(cpu, plain, shape) == Steps(16, 16, 1)
    assert shape_steps(cpu, replace(plain, weights="int4"), shape) == Steps(32, 32, 1)
    assert shape_steps(cpu, replace(plain, head="int4"), shape) == Steps(32, 16, 1)
    assert shape_steps(cpu, plain, model(hidden=128, ffn=256)) == Steps(16, 16, 1)
    wide = replace(cpu, rules=replace(cpu.rules, width_multiple=32))
    assert shape_steps(wide, plain, model(hidden=256, ffn=255)) == Steps(32, 16, 1)


def test_steps_follow_the_profile():
    shape, rules = model(hidden=4096, ffn=12288), load_profile(A2).rules
    for key, value, expected in (
        ("width_multiple", 256, Steps(256, 256, 1)),
        ("width_multiple", 16, Steps(16, 16, 1)),
        ("tiles", {"bf16": (48, 16)}, Steps(384, 384, 1)),
    ):
        assert shape_steps(replace(load_profile(A2), rules=replace(rules, **{key: value})), work(), shape) == expected


def test_padding_of_aligned_shapes_is_none():
    for devices in (1, 2, 4, 8):
        assert padding_loss(model(), load_profile(A2), work(devices=devices)) == 0


def test_padding_loss_by_hand():
    # One layer; hidden 64, one head of 16 for q, k and v, 24 FFN channels, 40 tokens: K and N go up to multiples of 16.
    shape = model(hidden=64, vocab=40, layers=1, query_heads=1, kv_heads=1, head_dim=16, ffn=24)
    used = 64 * 48 + 16 * 64 + 3 * 64 * 24 + 64 * 40
    done = 64 * 48 + 16 * 64 + 3 * 64 * 32 + 64 * 48
    assert padding_loss(shape, load_profile(A2), work()) == pytest.approx(1 - used / done)
    # int8 weights go in steps of 32 along K: o has K 16, down K 24; the head stays in bf16.
    done = 64 * 48 + 32 * 64 + 3 * 64 * 32 + 64 * 48
    eight = work(weights="int8", activations="int8")
    assert padding_loss(shape, load_profile(A2), eight) == pytest.approx(1 - used / done)


def test_padding_loss_counts_the_split():
    # Two devices: two heads of 16 are one each; 48 channels are 24 each, 80 tokens 40 each. As above on each of them.
    shape = model(hidden=64, vocab=80, layers=1, query_heads=2, kv_heads=2, head_dim=16, ffn=48)
    assert padding_loss(shape, load_profile(A2), work()) == 0
    used = 64 * 48 + 16 * 64 + 3 * 64 * 24 + 64 * 40
    done = 64 * 48 + 16 * 64 + 3 * 64 * 32 + 64 * 48
    assert padding_loss(shape, load_profile(A2), work(devices=2)) == pytest.approx(1 - used / done)


def test_padding_loss_of_copied_heads_is_none():
    # One KV head of 16 on each of two devices: a copy is no padding.
    shape = model(hidden=64, vocab=64, layers=1, query_heads=2, kv_heads=1, head_dim=16, ffn=64)
    assert padding_loss(shape, load_profile(A2), work(devices=2)) == 0


def broken(shape, name=A2, **values):
    return check_shape(shape, load_profile(name), work(**values))


def test_fine_shapes_break_no_rule():
    for devices in (1, 2, 4, 8):
        assert broken(model(), devices=devices) == []


BROKEN = [
    ("ffn", {"ffn": 1000}, {}, ("1000 FFN channels of every layer", "multiple of 16")),
    ("ffn split", {"ffn": 1040}, {"devices": 2}, ("1040 FFN", "520 on each of 2 devices", "multiple of 32")),
    ("ffn int8", {"ffn": 1040}, {"weights": "int8", "activations": "int8"}, ("1040 FFN", "multiple of 32")),
    ("hidden", {"hidden": 2040}, {}, ("hidden width 2040", "16")),
    ("hidden int8", {"hidden": 2064}, {"weights": "int8", "activations": "int8"}, ("hidden width 2064", "32")),
    ("head", {"head_dim": 40}, {}, ("head dimension 40 of every layer", "16", "bf16 keys and values")),
    ("head int8", {"head_dim": 80}, {"kv": "int8"}, ("head dimension 80", "32", "int8 keys and values")),
    ("vocabulary", {"vocab": 4100}, {}, ("vocabulary of 4100", "16", "pad it to 4112")),
    ("vocabulary split", {"vocab": 4112}, {"devices": 2}, ("vocabulary of 4112", "2 devices", "pad it to 4128")),
    ("heads", {"query_heads": 6, "kv_heads": 3}, {"devices": 4}, ("6 query and 3 KV heads", "4 devices")),
    ("copies", {"query_heads": 24, "kv_heads": 3}, {"devices": 8}, ("24 query and 3 KV heads", "8 devices")),
    ("devices", {"ffn": 4096, "query_heads": 16, "kv_heads": 16}, {"devices": 16}, ("at most 8 devices, not 16",)),
    ("memory", {}, {"batch": 1024, "prompt": 100_000}, ("more than the 64 GiB", "keys and values")),
    ("type", {}, {"weights": "int4"}, ("no int4 for weights", "use bf16 (or fp16, int8)")),
    ("head's type", {}, {"head": "fp32"}, ("no fp32 for weights of the output head", "use bf16")),
    ("unknown type", {}, {"kv": "fp8"}, ("no fp8 for keys and values", "use bf16")),
]


@pytest.mark.parametrize(("sizes", "values", "words"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_rule_is_one_sentence(sizes, values, words):
    (sentence,) = broken(model(**sizes), **values)
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence, sentence


def test_kv_heads_fewer_than_devices_are_copied():
    assert broken(model(query_heads=16, kv_heads=2), devices=8) == []
    assert broken(model(query_heads=8, kv_heads=1), devices=8) == []


def test_bf16_on_a_device_without_it_names_what_to_use():
    sentences = broken(model(), "ascend-310p3")
    assert len(sentences) == 3
    assert all("has no bf16" in sentence and "use fp16" in sentence for sentence in sentences)
    assert broken(model(), "ascend-310p3", weights="fp16", activations="fp16", kv="fp16") == []


def test_uneven_layers_are_refused_where_the_runtime_opens_none():
    shape = ModelShape(4096, 2048, False, (layer(), layer(ffn=2048)))
    (sentence,) = broken(shape)
    assert "vllm-ascend" in sentence and "--shapes uniform" in sentence
    fp16 = {"weights": "fp16", "activations": "fp16", "kv": "fp16"}
    assert check_shape(shape, load_profile("ascend-310b1"), work(**fp16)) == []
    fp32 = dict.fromkeys(fp16, "fp32")
    assert check_shape(shape, load_profile(CPU), work(**fp32)) == []


def test_a_rule_broken_by_some_layers_names_the_first():
    shape = ModelShape(4096, 2048, False, (layer(), layer(ffn=1000), layer(ffn=1008), layer(ffn=1001)))
    sentence = broken(shape)[0]
    assert "1000 FFN channels of layer 1 and 1 more" in sentence


def test_shapes_that_follow_the_steps_break_no_rule_of_widths_and_heads():
    dense, profile = model(hidden=4096, ffn=12288, query_heads=32, kv_heads=4), load_profile(A2)
    for devices in (1, 2, 4, 8):
        steps = shape_steps(profile, work(devices=devices), dense)
        pruned = dense.layers[0].resize(kv_heads=4 - steps.kv_heads or 4, ffn=12288 - 3 * steps.ffn)
        if pruned.kv_heads == 3:  # three cannot be copied onto four or eight devices evenly: the check says so
            pruned = pruned.resize(kv_heads=2)
        shape = replace(dense, hidden=4096 - steps.hidden, layers=(pruned,))
        assert broken(shape, devices=devices) == []
        assert padding_loss(shape, profile, work(devices=devices)) == 0


# The commands

runner = CliRunner()


@pytest.fixture(scope="module")
def command():
    """The sub-app under a root that turns errors into sentences, as the real one does."""
    root = typer.Typer(cls=Verbs, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    root.callback()(lambda: None)
    root.add_typer(app, name="profiles")
    return lambda *words: runner.invoke(root, ["profiles", *words])


def test_list_shows_every_profile_and_the_users_own_first(command, own_folder, data):
    write_own(own_folder, data, A2)
    ran = command("list")
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert lines[0].split() == ["name", "kind", "peak", "bandwidth", "memory", "runtime", "origin"]
    cells = ["npu", "353.9 TFLOPS bf16", "1600 GB/s", "64 GiB", "vllm-ascend"]
    assert re.split(r"\s{2,}", lines[1]) == [A2, *cells, "yours"]
    assert [re.split(r"\s{2,}", line) for line in lines[2:] if line.startswith(f"{A2} ")] == [
        [A2, *cells, "package, hidden by yours"]
    ]
    assert {line.split()[0] for line in lines[2:]} == set(NAMES)
    assert str(own_folder) in ran.stderr


def test_list_as_json(command, own_folder, data):
    path = write_own(own_folder, data, A2)
    result = json.loads(command("list", "--json", "--quiet").stdout)
    first = result["profiles"][0]
    assert (first["name"], first["path"], first["origin"], first["hidden"]) == (A2, str(path), YOURS, False)
    assert (first["type"], first["matrix_tflops"], first["capacity_gib"]) == ("bf16", 353.9, 64.0)
    assert [row["origin"] for row in result["profiles"] if row["hidden"]] == [SHIPPED]
    assert len(result["profiles"]) == len(NAMES) + 1
    assert result["folder"] == str(own_folder)


def test_list_warns_of_a_file_that_cannot_be_read_and_shows_the_others(command, own_folder):
    (own_folder / "bad.toml").write_text("name = 'bad'\nbandwidth = 3\n", encoding="utf-8")
    ran = command("list", "--quiet")
    assert ran.exit_code == 0
    assert "cannot be read" in ran.stdout.splitlines()[1]
    assert "warning" in ran.stderr and "bandwidth_gb_per_s" in ran.stderr
    assert set(NAMES) <= {line.split()[0] for line in ran.stdout.splitlines()}
    assert "bandwidth_gb_per_s" in json.loads(command("list", "--json").stdout)["profiles"][0]["error"]


def test_show_prints_every_field_with_its_unit_and_source(command):
    profile = load_profile(A2)
    ran = command("show", A2)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith(f"{A2} (npu): {profile.description}\n{FOLDER / A2}.toml\n")
    rows = {line.split()[0]: line for line in ran.stdout.splitlines() if line.strip()}
    assert {key for key, _ in list_fields(profile)} <= set(rows)
    for key, value, unit in (
        ("compute.matrix_tflops.int8", "707.8", "TFLOPS"),
        ("memory.bandwidth_gb_per_s", "1600", "GB/s"),
        ("memory.weight_efficiency", "0.8", "of the bandwidth"),
        ("rules.tiles.int8", "32, 16", "entries along K and N"),
        ("rules.uneven_layers", "no", ""),
    ):
        cells = re.split(r"\s{2,}", rows[key])
        assert cells[1:-1] == [value, *([unit] if unit else [])]
        notes = " ".join(ran.stdout.split("\n\n")[2].split())
        assert f"{cells[-1]} {find_source(profile, key)}" in notes


def test_show_as_json(command):
    profile = load_profile(CPU)
    result = json.loads(command("show", CPU, "--json").stdout)
    assert (result["name"], result["kind"], result["origin"]) == (CPU, "cpu", SHIPPED)
    found = {row["key"]: row for row in result["fields"]}
    assert set(found) == {key for key, _ in list_fields(profile)}
    assert found["memory.bandwidth_gb_per_s"]["value"] == profile.memory.bandwidth_gb_per_s
    assert found["memory.bandwidth_gb_per_s"]["unit"] == "GB/s (10^9 bytes per second)"
    assert found["rules.tiles.int4"]["value"] == [32, 16]
    assert found["runtime.all_logits"]["value"] is False
    assert all(row["source"] for row in result["fields"])


def test_show_reads_a_path_and_refuses_what_is_none(command, tmp_path, data):
    path = write_own(tmp_path, data, "mine")
    assert command("show", str(path)).stdout.startswith("mine (npu)")
    ran = command("show", "ascend-910")
    assert ran.exit_code == 2
    assert ran.stderr.startswith("lightpress: There is no profile 'ascend-910'")
    assert ran.stdout == ""


def test_the_group_alone_prints_its_help(command):
    ran = command()
    assert ran.exit_code == 0
    assert "list" in ran.stdout and "show" in ran.stdout

"""Strict reader and writer of device profiles: TOML with the unit in each key's name and a source for each number."""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from compress.errors import UserError
from profiles.profile import Compute, Formats, Link, Memory, Overhead, Profile, Rules, Runtime

YOURS, SHIPPED = "yours", "package"
SUFFIX = ".toml"
HEADER = "# A device profile of Lightpress: what each key means is said in profiles/profile.py."
SECTIONS: Mapping[str, type[Any]] = {
    "compute": Compute, "memory": Memory, "overhead": Overhead, "link": Link, "rules": Rules, "formats": Formats,
    "runtime": Runtime,
}  # fmt: skip
TEXTS = ("name", "description", "kind")
COMPUTED = ("fp32", "fp16", "bf16", "int8")  # types that a matrix unit may have, and activations
STORED = (*COMPUTED, "int4")  # types that weights may have
# What a quantisation needs: the type of its weights, and that of its activations where they are not the default.
QUANTISATIONS: Mapping[str, tuple[str, str]] = {
    "w8a8-static": ("int8", "int8"), "w8a8-dynamic": ("int8", "int8"), "compressed-tensors-w8a8": ("int8", "int8"),
    "int8": ("int8", ""), "int4": ("int4", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What a key may hold: numbers of `unit` from `low` to `high` (and 0 where `zero`), or one of `choices`.

    The range is what devices have, widely drawn: a number beyond it was written in another unit.
    """

    unit: str = ""
    low: float = 0.0
    high: float = math.inf
    zero: bool = False
    choices: tuple[str, ...] = ()


KEYS: Mapping[str, Key] = {
    "name": Key(),
    "description": Key(),
    "kind": Key(choices=("npu", "cpu", "gpu")),
    "compute.matrix_tflops": Key("TFLOPS (10^12 operations per second)", 1e-3, 5000, choices=COMPUTED),
    "compute.matrix_efficiency": Key("of the peak", 1e-3, 1),
    "compute.attention_efficiency": Key("of the peak", 1e-3, 1),
    "compute.half_rows": Key("rows", 0, 1e5),
    "compute.half_width": Key("channels", 0, 1e5),
    "compute.cores": Key("cores", 1, 4096),
    "compute.grain": Key("multiply-adds", 0, 1e9),
    "compute.overlap": Key("of the shorter", 0, 1),
    "compute.vector_gelements_per_s": Key("10^9 elements/s", 0.01, 1e5),
    "memory.capacity_gib": Key("GiB (2^30 bytes)", 0.05, 4096),
    "memory.bandwidth_gb_per_s": Key("GB/s (10^9 bytes per second)", 2, 2e4),
    "memory.weight_efficiency": Key("of the bandwidth", 1e-3, 1),
    "memory.state_efficiency": Key("of the bandwidth", 1e-3, 1),
    "memory.cache_mib": Key("MiB (2^20 bytes)", 0.03, 8192, zero=True),
    "memory.cache_gb_per_s": Key("GB/s (10^9 bytes per second)", 2, 1e5, zero=True),
    "overhead.matrix_op_us": Key("us (10^-6 seconds)", 0, 1e4),
    "overhead.vector_op_us": Key("us (10^-6 seconds)", 0, 1e4),
    "overhead.collective_us": Key("us (10^-6 seconds)", 0, 1e5),
    "overhead.step_us": Key("us (10^-6 seconds)", 0, 1e6),
    "overhead.parallel_us": Key("us (10^-6 seconds)", 0, 1e4),
    "overhead.head_us": Key("us (10^-6 seconds)", 0, 1e4),
    "link.devices": Key("devices", 1, 1024),
    "link.bandwidth_gb_per_s": Key("GB/s (10^9 bytes per second)", 0.1, 5000, zero=True),
    "link.efficiency": Key("of the bandwidth", 1e-3, 1),
    "rules.tiles": Key("entries along K and N", 1, 1024, choices=STORED),
    "rules.width_multiple": Key("channels", 1, 4096),
    "rules.head_multiple": Key("channels", 1, 512),
    "rules.vocab_multiple": Key("tokens", 1, 4096),
    "rules.uneven_layers": Key(),
    "formats.weights": Key(choices=STORED),
    "formats.activations": Key(choices=COMPUTED),
    "formats.kv": Key(choices=COMPUTED),
    "formats.quantisations": Key(choices=tuple(QUANTISATIONS)),
    "runtime.name": Key(),
    "runtime.export": Key(choices=("onnx", "ascend-om", "ascend-hf")),
    "runtime.head_passes": Key("passes", 0, 100),
    "runtime.score_passes": Key("passes", 0, 100),
    "runtime.state_passes": Key("passes", 0.1, 100),
    "runtime.vector_ops": Key("operations per layer", 0, 1000),
    "runtime.matrix_ops": Key("operations per layer", 0, 1000),
    "runtime.all_logits": Key(),
}


TABLES = ("compute.matrix_tflops", "rules.tiles")  # keys that hold an entry for each type


class Listed(NamedTuple):
    """A profile's name, its file, and whose it is: `yours` or `package`."""

    name: str
    path: Path
    origin: str


# Finding


def user_folder() -> Path:
    """Return the folder of the user's own profiles; LIGHTPRESS_PROFILES names another one."""
    own = os.environ.get("LIGHTPRESS_PROFILES")
    if own:
        return Path(own).expanduser()
    config = os.environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification has a relative path ignored.
    base = Path(config) if os.path.isabs(config) else Path("~/.config").expanduser()
    return base / "lightpress" / "profiles"


def list_profiles() -> list[Listed]:
    """Return all profiles unread: the user's own first, which go before the package's of the same name."""
    folders = ((YOURS, user_folder()), (SHIPPED, Path(__file__).parent))
    found = [Listed(path.stem, path, origin) for origin, folder in folders for path in folder.glob("*" + SUFFIX)]
    return sorted(found, key=lambda listed: (listed.origin != YOURS, listed.name))


def load_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """Return the profile of a name or of a .toml file; UserError for an unknown name or a bad file."""
    return read_profile(find_profile(name_or_path).path)


def find_profile(name_or_path: str | os.PathLike[str]) -> Listed:
    """Return where the profile of a name or of a .toml path lies; UserError for an unknown name."""
    text = os.fspath(name_or_path)
    if text.endswith(SUFFIX):
        return Listed(Path(text).stem, Path(text), YOURS)
    found = list_profiles()
    for listed in found:
        if listed.name == text:
            return listed
    near = difflib.get_close_matches(text, sorted({listed.name for listed in found}), n=1, cutoff=0.4)
    hint = f" (nearest: '{near[0]}')" if near else ""
    raise UserError(
        f"There is no profile '{text}'{hint}, neither in {user_folder()} nor in the package; choose one that "
        "`lightpress profiles list` shows, or give the path of a .toml file."
    )


# Reading


def read_profile(path: Path) -> Profile:
    """Return the profile in a file, whose name must be that of the file; UserError for any mistake in it."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read as a profile ({reason}); give a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not valid TOML ({error}); write one `key = value` per line.") from error
    profile = parse_profile(data, str(path))
    check_stem(profile.name, path)
    return profile


def check_stem(name: str, path: Path) -> None:
    """Raise UserError unless a profile is named after its file."""
    if path.name != name + SUFFIX:
        raise UserError(
            f"{path}: name is '{name}', but must be that of the file, '{path.stem}'; change it, or rename the file."
        )


def parse_profile(data: Mapping[str, Any], where: str) -> Profile:
    """Return the profile in the data of a TOML file; UserError names `where` (a path), the key and what it must be."""
    check_keys(data, where)
    texts: dict[str, Any] = {key: read_text(data[key], key, where) for key in TEXTS}
    sections = {name: parse_section(name, kind, data[name], where) for name, kind in SECTIONS.items()}
    profile = Profile(**texts, **sections, sources=parse_sources(data.get("sources", {}), where))
    check_formats(profile, where)
    check_pairs(profile, where)
    check_sources(profile, where)
    return profile


def check_keys(data: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a key that no profile has, then for one that is missing."""
    for name, value in data.items():
        if name in SECTIONS and not isinstance(value, dict):
            raise UserError(f"{where}: {name} must be a table; write [{name}] and its keys below it.")
        inner = [f"{name}.{key}" for key in value] if name in SECTIONS else [name]
        for key in inner:
            if key not in KEYS and key != "sources":
                raise UserError(f"{where}: {key} is not a key of a profile; {suggest_key(key)}.")
    for key in KEYS:
        section, _, inner_key = key.rpartition(".")
        if inner_key not in (data.get(section, {}) if section else data):
            raise UserError(f"{where}: {key} is missing; give {describe_key(key)}.")


def suggest_key(unknown: str) -> str:
    """Return in words which key was meant: of the same section if one is alike there, else of all."""
    section, _, last = unknown.rpartition(".")
    near = ""
    all_keys = [*KEYS, *SECTIONS]
    for known in ([key for key in all_keys if key.rpartition(".")[0] == section], all_keys):
        names = {key.rpartition(".")[2]: key for key in reversed(known)}  # of two alike the first
        found = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
        near = near or (names[found[0]] if found else "")
    if not near:
        return "leave it out"
    unit = KEYS[near].unit if near in KEYS else ""
    return f"the nearest is {near}" + (f", in {unit}: convert the value and rename it" if unit else ": rename it")


def describe_key(key: str) -> str:
    """Return in words what a key must hold."""
    rule, kind = KEYS[key], hint_of(key)
    if kind is bool:
        return "true or false"
    if kind == tuple[str, ...]:
        return f"a list of {', '.join(rule.choices)}"
    if kind is str:
        return f"one of {', '.join(rule.choices)}" if rule.choices else "a text"
    if key in TABLES:
        what = "a pair [K, N]" if key == "rules.tiles" else "a number"
        return f"a table with {what} for each type, in {rule.unit}"
    return describe_range(key)


def describe_range(key: str) -> str:
    """Return in words which numbers a key may hold, with their unit."""
    rule = KEYS[key]
    kind = "a whole number" if hint_of(key) is int or key == "rules.tiles" else "a number"
    unit = f" {rule.unit}" if rule.unit.startswith("of ") else f", in {rule.unit}"
    return f"{kind} from {rule.low:g} to {rule.high:g}{' or 0' if rule.zero else ''}{unit}"


def hint_of(key: str) -> Any:
    """Return the declared type of a key."""
    section, _, name = key.rpartition(".")
    return get_type_hints(SECTIONS[section] if section else Profile)[name]


def parse_section(name: str, kind: type[Any], data: Mapping[str, Any], where: str) -> Any:
    """Return one table of a profile as its dataclass."""
    readers = {item.name: READERS[hint_of(f"{name}.{item.name}")] for item in fields(kind)}
    return kind(**{key: read(data[key], f"{name}.{key}", where) for key, read in readers.items()})


def refuse(value: Any, key: str, where: str, must: str = "") -> UserError:
    """Return the error for a value that a key cannot hold."""
    must = must or describe_key(key)
    return UserError(f"{where}: {key} is {value!r}, but must be {must}; change it.")


def read_text(value: Any, key: str, where: str) -> str:
    """Return a text that is not empty, and one of the key's choices."""
    choices = KEYS[key].choices
    if not isinstance(value, str) or not value.strip() or (choices and value not in choices):
        raise refuse(value, key, where)
    return value


def read_flag(value: Any, key: str, where: str) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise refuse(value, key, where)
    return value


def read_number(value: Any, key: str, where: str, place: str = "") -> float:
    """Return a finite number in the key's range; `place` names it more closely in an error."""
    rule = KEYS[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(value, place or key, where, describe_range(key))
    if not (rule.low <= value <= rule.high or (rule.zero and value == 0)):
        # Far outside what devices have: most likely another unit.
        must = describe_range(key)
        raise UserError(f"{where}: {place or key} is {value!r}, but must be {must}; check its unit.")
    return float(value)


def read_whole(value: Any, key: str, where: str, place: str = "") -> int:
    """Return a whole number in the key's range."""
    if isinstance(value, float):
        raise refuse(value, place or key, where, describe_range(key))
    return int(read_number(value, key, where, place))


def read_names(value: Any, key: str, where: str) -> tuple[str, ...]:
    """Return a list of known names, each once; only quantisations may be none."""
    known = isinstance(value, list) and all(name in KEYS[key].choices for name in value)
    if not known or len(set(value)) < len(value) or (not value and key != "formats.quantisations"):
        raise refuse(value, key, where, describe_key(key) + ", each at most once")
    return tuple(value)


def read_types(value: Any, key: str, where: str) -> dict[str, Any]:
    """Return a table whose keys are known types."""
    if not isinstance(value, dict) or not value:
        raise refuse(value, key, where)
    for name in value:
        if name not in KEYS[key].choices:
            near = ", ".join(KEYS[key].choices)
            raise UserError(f"{where}: {key}.{name} is not for a known type; the types are {near}: leave it out.")
    return value


def read_peaks(value: Any, key: str, where: str) -> dict[str, float]:
    """Return a number for each type."""
    return {name: read_number(one, key, where, f"{key}.{name}") for name, one in read_types(value, key, where).items()}


def read_tiles(value: Any, key: str, where: str) -> dict[str, tuple[int, int]]:
    """Return the pair (K, N) for each type."""
    tiles = {}
    for name, pair in read_types(value, key, where).items():
        place = f"{key}.{name}"
        if not isinstance(pair, list) or len(pair) != 2:  # noqa: PLR2004 - K and N
            raise refuse(pair, place, where, f"two whole numbers, {KEYS[key].unit}")
        tiles[name] = (read_whole(pair[0], key, where, place), read_whole(pair[1], key, where, place))
    return tiles


READERS: Mapping[Any, Callable[[Any, str, str], Any]] = {
    str: read_text, bool: read_flag, float: read_number, int: read_whole, tuple[str, ...]: read_names,
    Mapping[str, float]: read_peaks, Mapping[str, tuple[int, int]]: read_tiles,
}  # fmt: skip


def parse_sources(data: Any, where: str) -> dict[str, str]:
    """Return section or "section.key" -> text; UserError where one names nothing of a profile."""
    if not isinstance(data, dict):
        raise UserError(f'{where}: sources must be a table; write [sources] and below it "section.key" = "text".')
    for key, text in data.items():
        if isinstance(text, dict):
            inner = f"{key}.{next(iter(text), '')}"
            raise UserError(f'{where}: sources.{key} has an unquoted point; write the key in quotes, as "{inner}".')
        if not isinstance(text, str) or not text.strip():
            raise refuse(text, f"sources.{key}", where, 'a text that says where the number comes from, or "estimate"')
        if not has_source(key):
            raise UserError(f"{where}: sources.{key} is the source of no key; {suggest_key(key).split(',')[0]}.")
    return dict(data)


# Checks of several keys together


def check_formats(profile: Profile, where: str) -> None:
    """Raise UserError where a format needs a peak, a tile or a type that the profile lacks."""
    formats, peaks, tiles = profile.formats, profile.compute.matrix_tflops, profile.rules.tiles
    for key, names in (("weights", formats.weights[:1]), ("activations", formats.activations)):
        for name in names:
            if name not in peaks:
                raise UserError(
                    f"{where}: formats.{key} has {name}, of which compute.matrix_tflops has no peak; give "
                    f"matrix_tflops.{name} in TFLOPS, or take {name} out."
                )
    if formats.activations[0] == "int8":
        raise UserError(f"{where}: formats.activations begins with int8; put the type of norms and scores first.")
    for name in formats.weights:
        if name not in tiles:
            raise UserError(f"{where}: rules.tiles.{name} is missing, as formats.weights has {name}; give [K, N].")
    for name in formats.quantisations:
        weights, activations = QUANTISATIONS[name]
        if weights not in formats.weights or (activations and activations not in formats.activations):
            needs = f"{weights} weights" + (f" and {activations} activations" if activations else "")
            raise UserError(f"{where}: formats.quantisations has {name}, which needs {needs}; add them or take it out.")


def check_pairs(profile: Profile, where: str) -> None:
    """Raise UserError where one number makes no sense beside another."""
    memory, link = profile.memory, profile.link
    if bool(memory.cache_mib) != bool(memory.cache_gb_per_s):
        raise UserError(
            f"{where}: memory.cache_mib (MiB) and memory.cache_gb_per_s (GB/s) must both be above 0, or both be 0 "
            "where there is no cache; change one."
        )
    if link.devices > 1 and not link.bandwidth_gb_per_s:
        raise UserError(
            f"{where}: link.bandwidth_gb_per_s is 0, but must be above 0, in GB/s, where link.devices is "
            f"{link.devices}; give it, or set devices = 1."
        )


def check_sources(profile: Profile, where: str) -> None:
    """Raise UserError for a number that no source vouches for."""
    for key, value in list_fields(profile):
        number = isinstance(value, int | float | tuple) and not isinstance(value, bool)
        if number and not key.startswith("formats.") and not find_source(profile, key):
            raise UserError(
                f'{where}: {key} has no source; add "{key}" or "{lookup_keys(key)[-1]}" to [sources] with where the '
                'number comes from, or "estimate".'
            )


def lookup_keys(key: str) -> list[str]:
    """Return the names under which the source of a key may stand, the closest first: itself, its table, its section."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def has_source(key: str) -> bool:
    """Whether a name may stand among the sources: a section, a key of one, or an entry of a table by type."""
    table, _, name = key.rpartition(".")
    return key in SECTIONS or key in KEYS or (table in TABLES and name in KEYS[table].choices)


def find_source(profile: Profile, key: str) -> str:
    """Return where the value of a key comes from; empty where nobody says."""
    return next((profile.sources[name] for name in lookup_keys(key) if name in profile.sources), "")


def find_unit(key: str) -> str:
    """Return the unit of a key's numbers; empty where it holds none."""
    return next((KEYS[name].unit for name in lookup_keys(key) if name in KEYS), "")


def list_fields(profile: Profile) -> Iterator[tuple[str, Any]]:
    """Yield each value below the sections with its key; the entries of a table one by one."""
    for section, kind in SECTIONS.items():
        for item in fields(kind):
            value = getattr(getattr(profile, section), item.name)
            if isinstance(value, Mapping):
                yield from ((f"{section}.{item.name}.{name}", one) for name, one in value.items())
            else:
                yield f"{section}.{item.name}", value


# Writing


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as TOML, whole or not at all; UserError where it would not be read back."""
    text = format_profile(profile)
    parse_profile(tomllib.loads(text), str(path))
    check_stem(profile.name, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        sibling.write_text(text, encoding="utf-8")
        sibling.replace(path)
    finally:
        sibling.unlink(missing_ok=True)


def format_profile(profile: Profile) -> str:
    """Return a profile as TOML text."""
    lines = [HEADER, *(f"{key} = {format_value(getattr(profile, key))}" for key in TEXTS)]
    for section, kind in SECTIONS.items():
        values = {item.name: getattr(getattr(profile, section), item.name) for item in fields(kind)}
        lines += ["", f"[{section}]", *(f"{key} = {format_value(value)}" for key, value in values.items())]
    lines += ["", "[sources]"]
    lines += [f"{format_value(key)} = {format_value(text)}" for key, text in profile.sources.items()]
    return "\n".join([*lines, ""])


def format_value(value: Any) -> str:
    """Return a text, number, flag, list or table as TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {format_value(one)}" for key, one in value.items()) + " }"
    if isinstance(value, tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, str):
        # The escapes of JSON are those of TOML, but for the one control character that JSON lets pass.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return str(value).lower() if isinstance(value, bool) else repr(value)

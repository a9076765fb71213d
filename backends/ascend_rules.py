"""The rules that `check-ascend` judges by: findings, chips, and the operator table of ascend_operators.toml."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import UserError
from profiles.profile import Profile

TABLE = Path(__file__).with_name("ascend_operators.toml")
SERVERS = Path(__file__).with_name("ascend_servers.toml")
ERROR, WARNING = "error", "warning"
STANDARD, ASCEND = "ai.onnx", "npu"
SHOWN = 3  # names that a sentence lists before it counts the rest


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or doubtful: rule, `error` or `warning`, place, and a sentence that says what to do."""

    rule: str
    severity: str
    file: str
    node: str
    sentence: str


@dataclass(frozen=True)
class Chip:
    """A chip family: what its compiler and its servers take; `linears` are quantisation types of dense linears."""

    family: str
    soc: str
    bf16: bool
    ranges: bool
    primitive: bool
    servers: bool
    lacks: tuple[str, ...]
    linears: tuple[str, ...]
    compressed_tensors: bool


@dataclass(frozen=True)
class Operator:
    """Where an operator is registered: opsets of ai.onnx (both ends counted), and whether in npu::1 too."""

    name: str
    opsets: tuple[tuple[int, int], ...]
    own: bool = False
    npu: bool = False


@cache
def load_rules() -> Mapping[str, Any]:
    """Return the data of ascend_operators.toml."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


@cache
def load_servers() -> Mapping[str, Any]:
    """Return the data of ascend_servers.toml."""
    return tomllib.loads(SERVERS.read_text(encoding="utf-8"))


@cache
def list_operators() -> Mapping[str, Operator]:
    """Return every registered operator by name (ascend.md 2.3 and 2.4)."""
    rules = load_rules()
    found = {}
    for own, group in [(False, group) for group in rules["operators"]] + [(True, group) for group in rules["ascend"]]:
        opsets = tuple((low, high) for low, high in group["opsets"])
        for name in group["names"]:
            found[name] = Operator(name, opsets, own, group.get("npu", False))
    return found


@cache
def list_socs() -> Mapping[str, str]:
    """Return the chip family of each known value of --soc_version (ascend.md 2.1)."""
    return {soc: family for family, chip in load_rules()["chips"].items() for soc in chip["socs"]}


def find_chip(soc: str) -> Chip | None:
    """Return the chip of a --soc_version, None for an unknown one."""
    family = list_socs().get(soc)
    if family is None:
        return None
    data = load_rules()["chips"][family]
    return Chip(
        family=family,
        soc=soc,
        bf16=data["bf16"],
        ranges=data["ranges"],
        primitive=data["primitive"],
        servers=data["servers"],
        lacks=tuple(data["lacks"]),
        linears=tuple(data["linears"]),
        compressed_tensors=data["compressed_tensors"],
    )


def explain_soc(soc: str) -> str:
    """Return why a --soc_version is refused and which to give; empty for a known one."""
    if soc in list_socs():
        return ""
    reason = load_rules()["prefixes"].get(soc, "")
    names = {known.lower(): known for known in list_socs()}
    near = [names[name] for name in difflib.get_close_matches(soc.lower(), list(names), n=1, cutoff=0.5)]
    # A family's name is a prefix of its members, which says more than a count of equal letters.
    members = [known for known in list_socs() if known.startswith(soc)] if soc else []
    hint = (members or near)[:1]
    nearest = f" (nearest: {hint[0]})" if hint else ""
    because = f": {reason}" if reason else ""
    return (
        f"--soc_version {soc} is not a chip that is known here{because}{nearest}; give Ascend and the name that "
        "`npu-smi info` prints."
    )


def require_soc(soc: str) -> str:
    """Return a --soc_version that the user gave; UserError for an unknown one."""
    problem = explain_soc(soc)
    if problem:
        raise UserError(problem)
    return soc


def find_profile_soc(profile: str) -> str:
    """Return the --soc_version of a shipped profile; UserError for a device that is no Ascend chip known here."""
    known: Mapping[str, str] = load_rules()["profiles"]
    if profile not in known:
        raise UserError(
            f"No --soc_version is known for the profile {profile}; give --soc-version instead, or one of the profiles "
            f"{', '.join(known)}."
        )
    return known[profile]


def settle_soc(profile: Profile, soc_version: str = "") -> str:
    """Return the --soc_version of a profile, or the one given where it is of the profile's family.

    A profile of the user's own may be of any NPU: then the chip must be given. Raises UserError for what does not fit.
    """
    if not soc_version:
        return find_profile_soc(profile.name)
    chip = find_chip(require_soc(soc_version))
    known = load_rules()["profiles"].get(profile.name)
    own = find_chip(known) if known else None
    if profile.kind != "npu" or (own is not None and chip is not None and own.family != chip.family):
        raise UserError(
            f"--soc-version {soc_version} is not a chip of the profile {profile.name} ({known or profile.kind}); leave "
            "it out, or give the profile of that chip."
        )
    return soc_version


def show_names(names: Iterable[str]) -> str:
    """Return a few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def holds_opset(operator: Operator, opset: int) -> bool:
    """Return whether an operator is registered for an opset of ai.onnx."""
    return any(low <= opset <= high for low, high in operator.opsets)


def show_opsets(operator: Operator) -> str:
    """Return the opsets of an operator as text, such as `8, 12 to 18`."""
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in operator.opsets)

"""The shape of the house: who may import whom, no family name in code, short functions, quick start, no pickles."""

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("compress", "backends", "profiles", "cli")
MAX_FUNCTION_LINES = 60

# A module of `compress` may import those on the lines above its own, and those on its own line as long as no cycle
# arises. A new module takes the highest line it can live on: the further up, the less it knows. A file split off
# another, `checkpoint_writer`, needs no entry: it stands beside `checkpoint`.
LAYERS = (
    {"", "errors", "parallel"},  # "" is compress/__init__.py
    {"shapes", "report", "recipe"},
    {"family", "rope", "spec"},
    {"checkpoint", "weights", "decoder", "text", "hidden"},
    {"stats", "calibrate", "sample", "gradients"},
    {"importance", "solve", "knapsack", "allocate", "goal"},
    {"plan", "surgery", "probe", "choose", "settle", "quantize", "evaluate", "frontier"},
    {"recover", "trials"},
    {"pipeline"},
    {"demo"},
)
RANKS = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
NARROW_ROOMS = {"report": {"shapes", "errors"}}  # frozen results know nothing else of their own layer or above
PROFILES_SEE = {"compress.shapes", "compress.errors"}
PACKAGE_SEES = {
    "compress": {"compress"},
    "profiles": {"profiles", "compress"},
    "backends": {"backends", "compress", "profiles"},
    "cli": {"cli", "backends", "compress", "profiles"},
}

HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "scipy")
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
PICKLING_CALLS = {"torch.save", "torch.load", "torch.serialization.save", "torch.serialization.load"}


def source_files():
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in source_files()}


@cache
def parse(module):
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def place(module, node):
    return f"{SOURCES[module].relative_to(ROOT)}:{node.lineno}"


# Imports


def imported_names(node):
    """Every dotted name that this node imports, wherever in the file it stands."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def own_module(name):
    """The module of this project that holds a dotted name (it need not exist), or None for a name from elsewhere."""
    if name.split(".")[0] not in PACKAGES:
        return None
    while name not in SOURCES and name.count(".") > 1:
        name = name.rpartition(".")[0]
    return name


def own_imports(module):
    """Pairs (node, imported module of this project)."""
    names = ((node, own_module(name)) for node in ast.walk(parse(module)) for name in imported_names(node))
    return [(node, target) for node, target in names if target is not None and target != module]


def room(module):
    return module.partition(".")[2].partition(".")[0]


def rank_of(name):
    return RANKS.get(name, RANKS.get(name.partition("_")[0]))


def breaks_direction(module, target):
    """Whether `module` importing `target` goes against the design's direction."""
    package, seen = module.split(".")[0], target.split(".")[0]
    if seen not in PACKAGE_SEES[package]:
        return True
    if package == "profiles" and seen == "compress":
        return target not in PROFILES_SEE
    if package != "compress" or room(module) == room(target):
        return False
    if room(target) not in NARROW_ROOMS.get(room(module), {room(target)}):
        return True
    ranks = rank_of(room(module)), rank_of(room(target))
    return None not in ranks and ranks[1] > ranks[0]  # a room without a rank fails its own test


def cycle_in(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return None


def test_every_room_of_compress_has_a_rank():
    rooms = {room(module) for module in SOURCES if module.split(".")[0] == "compress"}
    unknown = sorted(name for name in rooms if rank_of(name) is None)
    assert not unknown, f"give these modules a line in LAYERS (tests/test_structure.py): {unknown}"


def test_imports_point_one_way():
    wrong = [
        f"{place(module, node)} {module} imports {target}"
        for module in SOURCES
        for node, target in own_imports(module)
        if breaks_direction(module, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_compress_import_each_other_without_cycles():
    graph = {}
    for module in (name for name in SOURCES if name.split(".")[0] == "compress"):
        targets = {room(target) for _, target in own_imports(module) if target.split(".")[0] == "compress"}
        graph.setdefault(room(module), set()).update(targets - {room(module)})
    assert cycle_in(graph) is None, f"import cycle: {cycle_in(graph)}"


def test_imports_are_absolute():
    wrong = [
        place(module, node)
        for module in SOURCES
        for node in ast.walk(parse(module))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [name for name in SOURCES if not name.endswith("__main__")])
def test_module_imports(module):
    importlib.import_module(module)


@pytest.mark.skipif("cli.app" not in SOURCES, reason="cli/app.py does not exist yet")
def test_command_starts_without_heavy_imports():
    code = f"import sys, cli.app; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [], f"importing cli.app also imports {ran.stdout}"


# Family names


def strings_under(value, keys):
    """Every string that stands in a TOML value under one of these keys, at any depth."""
    if not isinstance(value, dict):
        return set()
    found = set()
    for key, inner in value.items():
        if key in keys:
            found.update([inner] if isinstance(inner, str) else inner)
        found |= strings_under(inner, keys)
    return found


def family_names():
    """Stems, model types and architectures of the family files, and the stems' leading word, as in `gemma3_text`."""
    names = set()
    for path in (ROOT / "compress" / "families").glob("*.toml"):
        leading = re.match(r"[a-z]*", path.stem).group()
        names |= {path.stem} | ({leading} if len(leading) > 3 else set())  # shorter ones, as phi, are also mathematics
        names |= strings_under(tomllib.loads(path.read_text(encoding="utf-8")), {"model_types", "architecture"})
    return names


def word_pattern(names):
    """Matches a name as a word of its own in snake_case, CamelCase and prose; `llama3` is not the word `llama`."""
    any_name = "|".join(sorted((re.escape(name) for name in names), key=len, reverse=True))
    return re.compile(rf"(?:(?<![A-Za-z0-9])|(?<=[a-z0-9])(?=[A-Z]))(?i:{any_name})(?![a-z0-9])")


def docstring_lines(tree):
    """Line numbers covered by strings that stand as a statement: docstrings of modules, functions and attributes."""
    strings = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    return {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}


def code_words(module):
    """Pairs (line, text) of each name and each string of a module that is no docstring."""
    skipped = docstring_lines(parse(module))
    kinds = {tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = tokenize.generate_tokens(io.StringIO(SOURCES[module].read_text(encoding="utf-8")).readline)
    return [(t.start[0], t.string) for t in tokens if t.type in kinds and t.start[0] not in skipped]


def test_no_family_name_in_code():
    names = family_names()
    assert names, "no family file found under compress/families"
    pattern = word_pattern(names)
    wrong = [f"file name {path.relative_to(ROOT)}" for path in SOURCES.values() if pattern.search(path.stem)]
    wrong += [
        f"{SOURCES[module].relative_to(ROOT)}:{line} {text}"
        for module in SOURCES
        for line, text in code_words(module)
        if pattern.search(text)
    ]
    assert not wrong, "a family's name belongs into compress/families/*.toml only:\n" + "\n".join(wrong)


# Functions and files


def test_functions_are_short():
    long = [
        f"{place(module, node)} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for module in SOURCES
        for node in ast.walk(parse(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, f"no function above {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


def import_aliases(tree):
    """Local name -> dotted name, so that `import torch as t; t.save` is seen for what it is."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias, name in zip(node.names, imported_names(node), strict=False):
                bound = alias.asname or alias.name
                aliases[bound] = name
    return aliases


def full_name(node, aliases):
    """The dotted name of `a.b.c`, its first part resolved through the file's imports; empty for other expressions."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, aliases)}.{node.attr}"
    return ""


def allows_pickle(node):
    return isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"


def pickling(module):
    tree = parse(module)
    aliases = import_aliases(tree)
    for node in ast.walk(tree):
        names = {full_name(node, aliases)} | set(imported_names(node))
        if any(name in PICKLING_CALLS or name.split(".")[0] in PICKLERS for name in names):
            yield node
        elif allows_pickle(node):
            yield node.value


def test_nothing_is_pickled():
    wrong = [f"{place(module, node)} {ast.unparse(node)}" for module in SOURCES for node in pickling(module)]
    assert not wrong, "weights travel as safetensors only:\n" + "\n".join(wrong)

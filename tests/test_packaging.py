"""Guards for four generic top-level names: the right ones are imported, and the wheel holds exactly what it should."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("compress", "backends", "profiles", "cli")
NOT_SHIPPED = {"__pycache__", ".mypy_cache", ".ruff_cache", ".DS_Store"}


@pytest.mark.parametrize("name", PACKAGES)
def test_name_resolves_to_this_project(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not importable: install the project with `pip install -e .`"
    assert spec.origin == str(ROOT / name / "__init__.py"), f"another {name} shadows ours: {spec.origin}"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_to_ship(folder, pattern="*"):
    found = (path for path in (ROOT / folder).rglob(pattern) if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if not NOT_SHIPPED & set(path.parts)}


def test_wheel_has_exactly_our_top_level_names(wheel_names):
    version = importlib.metadata.version("lightpress")
    assert {name.split("/")[0] for name in wheel_names} == {*PACKAGES, f"lightpress-{version}.dist-info"}


def test_wheel_holds_every_module_and_type_marker(wheel_names):
    for package in PACKAGES:
        assert f"{package}/py.typed" in wheel_names
        assert files_to_ship(package, "*.py") <= wheel_names


def test_wheel_holds_families_and_profiles(wheel_names):
    families = files_to_ship("compress/families", "*.toml")
    assert families, "no family file found under compress/families"
    assert families | files_to_ship("profiles", "*.toml") <= wheel_names


def test_wheel_holds_the_demo_checkpoint(wheel_names):
    checkpoint = files_to_ship("compress/demo/checkpoint")
    if not checkpoint:
        pytest.skip("compress/demo/checkpoint does not exist yet")
    assert checkpoint <= wheel_names

"""What is installed, and what is in the archives that it is installed from."""

import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import gradtools as gt

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def distribution():
    return importlib.metadata.distribution("gradtools")


def test_the_metadata_are_valid_and_complete(distribution):
    text = distribution.read_text("METADATA")
    metadata = Metadata.from_email(text, validate=True)  # as package indexes validate
    assert str(metadata.version) == gt.__version__
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.requires_python == ">=3.11"
    assert metadata.summary
    assert metadata.keywords
    assert metadata.author
    assert metadata.description_content_type == "text/markdown"
    assert (metadata.description or "").startswith("# gradtools")
    assert "Typing :: Typed" in metadata.classifiers


def test_torch_and_numpy_are_all_that_it_needs(distribution):
    needed = [Requirement(text) for text in distribution.requires]
    assert {r.name for r in needed if r.marker is None} == {"torch", "numpy"}
    assert all("extra" in str(r.marker) for r in needed if r.marker is not None)
    extras = set(distribution.metadata.get_all("Provides-Extra"))
    assert extras == {"report", "scipy", "demo"}


def test_pytest_finds_the_plugin(distribution):
    (entry,) = distribution.entry_points
    assert (entry.group, entry.name) == ("pytest11", "gradtools")
    assert entry.load().pytest_addoption


def test_the_command_line_is_there():
    command = [sys.executable, "-W", "ignore", "-m", "gradtools", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python -m gradtools" in done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    if not (ROOT / "gradtools").exists():
        pytest.skip("the sources are not here: the wheel is what is installed")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as zipped, tarfile.open(sdist) as packed:
        top = f"gradtools-{gt.__version__}/"
        return zipped.namelist(), [n.removeprefix(top) for n in packed.getnames()]


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    wheel, _ = archives
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "gradtools").rglob("*.py")}
    info = {name for name in wheel if name.startswith("gradtools-")}
    assert set(wheel) - info == sources | {"gradtools/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_sdist_can_be_built_and_tested(archives):
    _, sdist = archives
    assert {
        *("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
        *("Makefile", "constraints.txt", "conftest.py", "PKG-INFO", ".ci/run"),
        *("gradtools/py.typed", "tests/conftest.py", "examples/digits.py"),
    } <= set(sdist)
    assert not [name for name in sdist if "__pycache__" in name or ".venv" in name]

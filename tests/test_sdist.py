"""What the source distribution holds, and what its metadata says."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What packaging adds, and what only git reads.
GENERATED = ("PKG-INFO", "setup.cfg", "python/torch_rope.egg-info/")
LEFT_OUT = {".gitignore"}


def tracked_files() -> list[str]:
    """Lists the files of the repository; skips the test where there is none."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no repository here")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# Runs where no torch is installed.
PROGRAM = """
import importlib.metadata as metadata, sys
real = metadata.distributions
metadata.distributions = lambda **of: iter(()) if of.get("name") == "torch" else real(**of)
sys.modules["torch"] = None
sys.path.insert(0, "tools")
import build_backend
print(build_backend.get_requires_for_build_sdist())
build_backend.build_sdist("..")
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a source distribution of the repository's files, and unpacks it."""
    pytest.importorskip("scikit_build_core", reason="no scikit-build-core here")
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked_files():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder / "source", capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    assert "torch" not in completed.stdout.splitlines()[0]
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> Message:
    return email.message_from_string((unpacked / "PKG-INFO").read_text())


def test_it_holds_every_file_of_the_repository(unpacked: Path) -> None:
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    packed = {name for name in files if not name.startswith(GENERATED)}
    assert packed == set(tracked_files()) - LEFT_OUT


def test_it_changes_no_file(unpacked: Path) -> None:
    names = set(tracked_files()) - LEFT_OUT
    assert not [n for n in names if (unpacked / n).read_bytes() != (ROOT / n).read_bytes()]


def test_it_works_with_every_supported_torch(metadata: Message) -> None:
    project = (ROOT / "tools" / "build_backend.py").read_text()
    supported = re.search(r'^TORCH = "torch(>=[\d.]+),(<[\d.]+)"', project, re.MULTILINE)
    assert supported is not None
    (requirement,) = metadata.get_all("Requires-Dist", [])
    assert sorted(requirement.removeprefix("torch").split(",")) == sorted(supported.groups())


def test_its_metadata_names_authors_licences_and_versions(metadata: Message) -> None:
    assert metadata["Author"] == "torch-rope contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File", [])) == {
        "LICENSE",
        "NOTICE",
        "THIRD_PARTY_LICENSES.md",
    }
    classifiers = metadata.get_all("Classifier", [])
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(classifiers)
    assert not [each for each in classifiers if each.startswith("License ::")]
    assert metadata["Requires-Python"] == ">=3.10"


def test_its_description_links_to_no_file(metadata: Message) -> None:
    description = metadata.get_payload()
    assert "torch_rope.apply" in description
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links
    assert not [link for link in links if not link.startswith("https://")]


def test_the_licence_names_its_owner(unpacked: Path) -> None:
    owner = "Copyright 2026 torch-rope contributors\n"
    for name in ("LICENSE", "NOTICE"):
        text = (unpacked / name).read_text()
        assert owner in text
        assert "[yyyy]" not in text

"""The lock files of requirements/ and CITATION.cff against setup.py, so that none changes without the other."""

import pathlib
import re
import runpy
import sys
import types

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("pod-*.txt"))


@pytest.fixture(scope="module")
def project() -> dict:
    """What setup.py hands to setuptools."""
    found = {}
    fake = types.SimpleNamespace(find_packages=lambda **_: [], setup=lambda **values: found.update(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", fake)
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def pins(text: str) -> dict[str, str]:
    """Version by canonical name. Fails for a line that is no pin with hashes: a URL, an index, an option."""
    lines = text.replace("\\\n", " ").splitlines()
    matched = [
        re.fullmatch(r"(\S+)==(\S+)( +--hash=sha256:[0-9a-f]{64})+ *", s) for s in lines if s[:1] != "#"
    ]
    assert matched and all(matched)
    return {canonicalize_name(m[1].partition("[")[0]): m[2] for m in matched}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_bound_of_setup_is_met(path, project):
    pinned = pins(path.read_text())
    (locked,) = re.findall(r"^LOCKED = (.+)$", (ROOT / "Makefile").read_text(), re.M)
    asked = [*project["install_requires"], *(r for e in locked.split() for r in project["extras_require"][e])]
    wrong = []
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version):
            wrong.append(f"{requirement}: {version}")
    assert not wrong, f"run make lock: {wrong}"
    assert "libtpu" in pinned  # of an extra of an extra


def test_there_is_one_for_every_python(project):
    found = {path.stem.removeprefix("pod-") for path in LOCKS}
    supported = SpecifierSet(project["python_requires"])
    assert found == {"3.11", "3.12", "3.13"} and all(supported.contains(version) for version in found)
    default = re.search(r"^ARG PYTHON=(.+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert default[1] in found


def test_the_citation_is_of_this_version(project):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])

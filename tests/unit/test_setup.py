"""The lock, setup.py and the set-up script agree, and each foreseen failure is one sentence."""

import importlib.metadata
import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}  # why: the lock's first lines


@pytest.fixture
def make_venv():
    """A fresh copy of tools/setup/make_venv.py as a module."""
    path = ROOT / "tools" / "setup" / "make_venv.py"
    spec = importlib.util.spec_from_file_location("make_venv", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def locked():
    """Canonical name -> version, of the lock."""
    text = (ROOT / "tools" / "setup" / "requirements-cpu.lock").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    versions = {}
    for line in lines:
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "*" not in pin.version, line
        versions[canonicalize_name(requirement.name)] = pin.version
    assert len(versions) == len(lines), "a package is listed twice"
    return versions


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py passes to setuptools."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_the_lock_satisfies_setup_py(locked, make_venv, setup_arguments):
    extras = setup_arguments["extras_require"]
    wanted = [*setup_arguments["install_requires"], *extras["cpu"]]
    wanted += [*extras["launch"], *extras["analysis"], *extras["dev"]]
    versions = {**locked, "torch": make_venv.TORCH.split("==")[1]}
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])


def test_the_lock_is_complete(locked, make_venv):
    """What `pip check` says of an environment made from the lock: only what is left out lacks."""
    versions = {**locked, "torch": make_venv.TORCH.split("==")[1]}
    missing, refused = set(), []
    for name in versions:
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # not for this platform, or this environment is not the lock's
        for requirement in map(Requirement, requires):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in versions:
                missing.add(needed)
            elif not requirement.specifier.contains(versions[needed], prereleases=True):
                refused.append(f"{name} needs {requirement}, locked is {versions[needed]}")
    assert missing == LEFT_OUT
    assert refused == []


def test_every_dependency_says_why():
    for line in (ROOT / "setup.py").read_text().splitlines():
        if re.match(r'\s+"[\w-]+(\[[\w,]+\])?[=<>]=', line):
            assert "  # " in line, line


def test_an_old_python_is_refused(make_venv, monkeypatch):
    old = {"version": "3.9", "executable": "/usr/bin/python3.9", "has_venv": True}
    monkeypatch.setattr(make_venv, "probe", lambda python: None if "3.1" in python else old)
    monkeypatch.setattr(make_venv.sys, "executable", "/usr/bin/python3")
    with pytest.raises(make_venv.SetupError, match=r"needs Python 3\.11 or 3\.12, but /usr/"):
        make_venv.find_python()


def test_a_supported_python_on_the_path_is_taken(make_venv, monkeypatch):
    def fake(python):
        version = {"python3.12": "3.12"}.get(python, "3.13")
        return {"version": version, "executable": python, "has_venv": True}

    monkeypatch.setattr(make_venv, "probe", fake)
    assert make_venv.find_python()["executable"] == "python3.12"


def test_a_machine_without_disk_or_linux_is_refused(make_venv, monkeypatch, tmp_path):
    monkeypatch.setattr(make_venv, "STAMP", tmp_path / "none")
    make_venv.check_machine()
    monkeypatch.setattr(make_venv, "NEEDED_GB", 1e9)
    with pytest.raises(make_venv.SetupError, match=r"GB of disk in .*GB free"):
        make_venv.check_machine()
    monkeypatch.setattr(make_venv.sys, "platform", "darwin")
    with pytest.raises(make_venv.SetupError, match="are for Linux, not for darwin"):
        make_venv.check_machine()


def test_a_stamp_holds_for_its_inputs_only(make_venv, monkeypatch, tmp_path):
    assert make_venv.inputs() == make_venv.inputs()
    monkeypatch.setattr(make_venv, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(make_venv, "VENV", tmp_path)
    assert not make_venv.is_ready()
    (tmp_path / "stamp.json").write_text('{"inputs": {}, "python": "3.11"}')
    assert not make_venv.is_ready()
    monkeypatch.setattr(make_venv, "inputs", dict)
    assert not make_venv.is_ready(), "there is no Python in it"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho 3.11\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    assert make_venv.is_ready()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho 3.12\n")
    assert not make_venv.is_ready(), "another Python under the links"


def test_pip_output_becomes_one_sentence(make_venv):
    said = "WARNING: Retrying: Temporary failure in name resolution\nERROR: No match for torch\n"
    sentence = make_venv.explain(said)
    assert "\n" not in sentence and sentence.startswith("No match for torch (the package index")
    assert "cannot be reached" not in make_venv.explain("ERROR: No match for torch")

"""The names that the package exports."""

from __future__ import annotations

import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

import alm_torchrl
from alm_torchrl.lazy import lazy_imports

EXTRAS = ("gymnasium", "hydra", "lightning", "matplotlib")


@pytest.mark.parametrize("name", alm_torchrl.__all__)
def test_public_names_are_found(name: str) -> None:
    assert getattr(alm_torchrl, name) is not None
    assert name in dir(alm_torchrl)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ALMLos'"):
        _ = alm_torchrl.ALMLos


def test_a_name_whose_module_fails_is_not_said_to_be_missing(tmp_path: Path, monkeypatch) -> None:
    """With MUJOCO_GL=egl and no EGL, importing MuJoCo raises an AttributeError."""
    (tmp_path / "broken_module.py").write_text("None.eglQueryString")
    monkeypatch.syspath_prepend(tmp_path)
    get, _ = lazy_imports({"__name__": "package", "__all__": ["name"]}, {"name": "broken_module"})
    with pytest.raises(ImportError, match="broken_module cannot be imported: .*'eglQueryString'"):
        get("name")


def test_the_import_needs_no_extra() -> None:
    program = f"""
import sys
import alm_torchrl
assert "torch" not in sys.modules
from alm_torchrl import ALMAgent, ALMLoss, make_collector, make_env, make_replay_buffer
print([name for name in {EXTRAS} if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_notation_table_names_arguments_of_the_loss() -> None:
    table = alm_torchrl.__doc__ or ""
    arguments = set(signature(alm_torchrl.ALMLoss.__init__).parameters)
    networks = {"encoder", "dynamics", "actor", "reward_model", "classifier", "qvalue_network"}
    assert networks <= arguments
    assert networks <= set(re.findall(r"``(\w+)``", table))


def test_the_version_is_that_of_the_citation() -> None:
    citation = Path(__file__).resolve().parents[1] / "CITATION.cff"
    assert f"version: {alm_torchrl.__version__}" in citation.read_text(encoding="utf-8")

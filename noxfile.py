"""Checks of the project: `nox` runs the quick ones, `nox -s full` all tests; `nox -l` lists all.

All sessions except `lint`, `dmc`, `oldest` and `newest` share one environment, `stack`, because
torch, TorchRL, Lightning and MuJoCo are large. It is reinstalled when pyproject.toml or
constraints.txt change.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = "recipes,hub,export,ray,docs,dev,bench"
QUICK = ("-m", "not slow", "--numprocesses=auto")
OLDEST_TORCH = "2.11.0"  # of pyproject.toml's range; constraints.txt has the newest
LINTERS = ["ruff", "import-linter"]

nox.needs_version = ">=2026.10.20"
nox.options.envdir = os.environ.get("NOX_ENVDIR", ".nox")
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "tests", "docs", "smoke"]


def _fingerprint() -> str:
    """Return a digest of everything that determines the packages in `stack`."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run_in_stack(session: nox.Session, *command: str, **env: str) -> None:
    """Run a program of the shared environment, e.g. `_run_in_stack(session, "pytest", "-q")`."""
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    program = session.cache_dir.parent / "stack" / scripts / command[0]
    session.run(str(program), *command[1:], external=True, env=env)


def _run_pytest(session: nox.Session, *arguments: str) -> None:
    # The tests use tiny tensors, which a second thread slows down.
    _run_in_stack(session, "pytest", *arguments, OMP_NUM_THREADS="1")


# pip and venv instead of uv, which does not read pip's configuration.
@nox.session(venv_backend="venv", reuse_venv=True, default=False)
def stack(session: nox.Session) -> None:
    """Install the package with all extras into the shared environment."""
    stamp = Path(session.virtualenv.location) / "installed.sha256"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == _fingerprint():
        session.log("up to date with pyproject.toml and constraints.txt")
        return
    session.install("-c", str(CONSTRAINTS), "-e", f".[{EXTRAS}]")
    stamp.write_text(_fingerprint(), encoding="utf-8")


@nox.session(venv_backend="venv", reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style, formatting, imports between modules and length limits (needs no torch)."""
    session.install("-c", str(CONSTRAINTS), *LINTERS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", env={"PYTHONPATH": f"src{os.pathsep}."})
    session.run("python", "tools/check_lengths.py")


@nox.session(venv_backend="none", requires=["stack"])
def types(session: nox.Session) -> None:
    """Check types."""
    _run_in_stack(session, "mypy", *session.posargs)


@nox.session(venv_backend="none", requires=["stack"])
def tests(session: nox.Session) -> None:
    """Run the quick tests and docstring examples; arguments go to pytest."""
    _run_pytest(session, *(session.posargs or QUICK))


@nox.session(venv_backend="venv", reuse_venv=True, default=False)
def oldest(session: nox.Session) -> None:
    """Run the quick tests with the oldest torch; arguments go to pytest."""
    pins = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    others = [pin for pin in pins if not pin.startswith("torch==")]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*others, f"torch=={OLDEST_TORCH}"]), encoding="utf-8")
    session.install("-c", str(constraints), "-e", f".[{EXTRAS}]")
    session.run("pytest", *(session.posargs or QUICK), env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="venv", reuse_venv=True, default=False)
def newest(session: nox.Session) -> None:
    """Run the quick tests with the newest release of every package; arguments go to pytest."""
    session.install("--upgrade", "-e", f".[{EXTRAS}]")
    session.run("pytest", *(session.posargs or QUICK), env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="none", requires=["stack"], default=False)
def full(session: nox.Session) -> None:
    """Run all tests with coverage; arguments are added to pytest's."""
    coverage = ["--cov", "--cov-report=term"]
    _run_pytest(session, *coverage, "--numprocesses=auto", "--durations=40", *session.posargs)


@nox.session(venv_backend="none", requires=["stack"])
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html, with warnings as errors."""
    _run_in_stack(
        session, "sphinx-build", "-W", "--keep-going", "-E", "-q", "-b", "html",
        "docs", "docs/_build/html", *session.posargs,
    )  # fmt: skip


@nox.session(venv_backend="none", requires=["stack"])
def smoke(session: nox.Session) -> None:
    """Run a few small updates of the quickstart recipe; arguments go to the recipe."""
    folder = Path(session.create_tmp()).resolve() / "run"
    few = [
        "training.warmup_steps=200", "training.total_steps=100", "training.batch_size=32",
        "agent.hidden_dim=32", "agent.dynamics_hidden_dim=32",
        "evaluation.every=50", "evaluation.episodes=1",
    ]  # fmt: skip
    command = ["recipes/mujoco.py", *few, f"run.folder={folder}", *session.posargs]
    _run_in_stack(session, "python", *command, OMP_NUM_THREADS="1")
    for name in ("curve.csv", "curve.png", "agent_last.pt"):
        if not (folder / name).is_file():
            session.error(f"the run did not write {name}")


@nox.session(venv_backend="venv", reuse_venv=True, default=False)
def dmc(session: nox.Session) -> None:
    """Test the environments with the DeepMind Control Suite and MuJoCo 3."""
    session.install("-c", "constraints-dmc.txt", "-e", ".[dmc,dev]")
    session.run("pytest", "tests/envs", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="none", requires=["stack"], default=False)
def bench(session: nox.Session) -> None:
    """Run the short benchmarks; arguments replace `--short`."""
    _run_in_stack(session, "python", "-m", "benchmarks", *(session.posargs or ["--short"]))


@nox.session(venv_backend="none", requires=["stack"], default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests that need a GPU, and all benchmarks into results/benchmarks."""
    if not session.posargs:
        _run_in_stack(session, "pytest", "-m", "gpu")
    bench = ("python", "-m", "benchmarks", "--out", "results/benchmarks", *session.posargs)
    _run_in_stack(session, *bench, "update", "step", "seeds", "peers", "memory")
    paper = ("--steps", "2000", "--option", "preset=paper", "--option", "run.precision=bf16-mixed")
    _run_in_stack(session, *bench, "loop", *paper)
    _run_in_stack(session, *bench, "loop", *paper, "--option", "training.policy_lag=1")

"""Finds a trained agent and its task, for enjoy.py and export.py."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from alm_torchrl.agent import ALMAgent, find_pretrained
from alm_torchrl.envs import make_env
from alm_torchrl.envs.failures import EnvironmentFailedError
from alm_torchrl.files import one_line
from alm_torchrl.objectives import check_encoder
from alm_torchrl.pretrained import read_config

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
_MISTAKES = (ValueError, TypeError, OSError, ImportError, EnvironmentFailedError, HydraException)
#: Options that an older run lacks.
_DEFAULTS = {"agent": {"networks": {}, "network_kwargs": {}}, "encoder": {"transforms": []}}


@dataclass
class Trained:
    """An agent, where it was found, the arguments of make_env for its task, and its evaluation."""

    path: Path
    agent: ALMAgent
    environment: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :func:`find` to a command line."""
    parser.add_argument("agent", help="run folder, agent file, name under pretrained/, or hub id")
    parser.add_argument("--task", help="task, such as Hopper-v5, if it is not known from the agent")


def main(script: Callable[[], None]) -> None:
    """Runs a script, and reports the mistakes of its user in one line."""
    try:
        script()
    except _MISTAKES as error:
        cause = error.__cause__ if isinstance(error, HydraException) else ""
        sys.exit(" ".join(f"{type(error).__name__}: {error} {cause}".split()))


def find(name: str, task: str | None = None) -> Trained:
    """Loads an agent, and checks that it fits its task.

    Classes that a run's ``config.yaml`` names are called. A pretrained folder runs no code.

    Raises:
        OSError: if there is no such agent, or it cannot be downloaded.
        ValueError: if it cannot be loaded, its task is not known, or it does not fit the task.
    """
    path = Path(name)
    if not path.exists() and (PRETRAINED / name).is_dir():
        path = PRETRAINED / name
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        trained = _from_run(path, task)
    elif path.is_dir() or "/" in name:
        trained = _from_pretrained(find_pretrained(path), task)
    else:
        known = ", ".join(sorted(file.parent.name for file in PRETRAINED.glob("*/config.json")))
        raise FileNotFoundError(
            f"{name} is neither a file nor a folder, and pretrained/ has {known or 'no agents yet'}"
        )
    agent, env = trained.agent.eval(), make_env(**trained.environment)
    observations, actions = env.observation_spec_unbatched, env.action_spec_unbatched
    env.close()
    try:
        check_encoder(agent.encoder, observations, agent.dynamics, action_spec=actions)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {trained.environment['task']}: {error}") from error
    return trained


def _from_pretrained(folder: Path, task: str | None) -> Trained:
    agent, config = ALMAgent.from_pretrained(folder), read_config(folder)
    environment = dict(config.get("environment") or {})
    if task is None and ":" in (asked := str(environment.get("task"))):
        raise ValueError(f"{folder} asks to import {asked}: if you trust it, give it as --task")
    environment = _with_task(environment, task, folder)
    return Trained(folder, agent, environment, dict(config.get("evaluation") or {}))


def _from_run(path: Path, task: str | None) -> Trained:
    """Loads the agent of a run, or an agent's file, with the run's options if they are there."""
    file = path if path.is_file() else _agent_file(path)
    # One of several seeds has its options in the folder above.
    folders = [file.parent, file.parent.parent] if "seed" in file.parent.name else [file.parent]
    config = next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)
    if config is None:
        return Trained(file, ALMAgent.load(file), _with_task({}, task, file))
    environment, options = _read_run(config)
    environment = _with_task(environment, task, file)
    return Trained(file, ALMAgent.load(file, **_own_networks(options, environment)), environment)


def _own_networks(options: Any, environment: dict[str, Any]) -> dict[str, Any]:
    """Builds the networks of a run again if some are not of the package."""
    from recipes.build_agent import make_networks  # imports Lightning

    targets = OmegaConf.to_yaml(OmegaConf.create([options.encoder.build, options.agent.networks]))
    if not re.search(r"_target_: (?!alm_torchrl\.)", targets):
        return {}
    kwargs = instantiate(options.agent.network_kwargs, _convert_="all")
    return make_networks(options, make_env(**environment), kwargs)


def _read_run(config: Path) -> tuple[dict[str, Any], Any]:
    """Returns the arguments of make_env and the options of a run."""
    from recipes.config import env_options
    from recipes.options import Task

    try:
        options: Any = OmegaConf.merge(_DEFAULTS, OmegaConf.load(config))
        task: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Task), options.task))
    except (OmegaConfBaseException, YAMLError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{config} is not the config.yaml of a run: {one_line(error)}") from error
    transforms = [instantiate(transform) for transform in options.encoder.transforms]
    return {"task": task.id, **env_options(task), "transforms": transforms}, options


def _agent_file(folder: Path) -> Path:
    for name in ("agent_best.pt", "agent_last.pt"):
        if (folder / name).is_file():
            return folder / name
    if seeds := sorted(map(str, folder.glob("seed*/"))):
        raise FileNotFoundError(f"{folder} has several seeds: choose one of {', '.join(seeds)}")
    raise FileNotFoundError(
        f"{folder} has no agent_best.pt, agent_last.pt or config.json: a run has an agent after "
        "its first evaluation"
    )


def _with_task(environment: dict[str, Any], task: str | None, path: Path) -> dict[str, Any]:
    if not (chosen := task or environment.get("task")):
        raise ValueError(f"the task of {path} is not known: give it, such as --task Hopper-v5")
    return {**environment, "task": chosen}

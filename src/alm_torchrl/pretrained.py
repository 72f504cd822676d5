"""Folders with a published agent (safetensors, JSON, a model card), local or on a hub."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from alm_torchrl.files import atomic_write, one_line

_FILES = ("config.json", "agent.safetensors", "README.md")
_FOLDERS_NEED = "folders of an agent need"


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, Any], card: str) -> None:
    """Writes the files of :meth:`alm_torchrl.agent.ALMAgent.save_pretrained`."""
    save = _require("safetensors.torch", _FOLDERS_NEED).save
    if other := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"safetensors can only save tensors, not {other[0]}: use ALMAgent.save")
    # Safetensors refuses tensors that share memory.
    tensors = {name: value.cpu().clone().contiguous() for name, value in weights.items()}
    contents = (json.dumps(_to_json(config), indent=1).encode(), save(tensors), card.encode())
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(_FILES, contents, strict=True):
        with atomic_write(folder / name) as file:
            file.write(content)


def read_folder(folder: Path) -> dict[str, Any]:
    """Reads the configuration, and the weights as ``state_dict``."""
    load_file = _require("safetensors.torch", _FOLDERS_NEED).load_file
    content = read_config(folder)
    return {**content, "state_dict": load_file(folder / _FILES[1])}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads ``config.json``; its lists become tuples."""
    return _from_json(json.loads((folder / _FILES[0]).read_text(encoding="utf-8")))


def find_pretrained(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of a published agent, and downloads it if necessary.

    Args:
        path_or_hub_id: the folder, or a repository ``OWNER/NAME`` of the Hugging Face Hub.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: if there is no such folder.
        ImportError: if a download needs the extra ``hub``, which is not installed.
        OSError: if the repository cannot be downloaded.
    """
    folder, name = Path(path_or_hub_id), str(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"{name} is neither a folder nor a repository OWNER/NAME of the Hugging Face Hub"
        )
    hub = _require("huggingface_hub", f"{name} is not a folder, and downloading it needs")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=[*_FILES]))
    except Exception as error:  # the network and the hub raise many types
        raise OSError(
            f"{name} is not a folder and cannot be downloaded from the Hugging Face Hub: check the "
            f"name and the network, or log in with 'hf auth login' ({one_line(error)})"
        ) from error


def _require(module: str, need: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{need} {package}: pip install 'alm-torchrl[hub]'") from error


def _to_json(value: Any) -> Any:
    """Converts nested keys of dictionaries to strings, because JSON has no other keys."""
    if isinstance(value, dict):
        text = {key if isinstance(key, str) else json.dumps(key): key for key in value}
        return {name: _to_json(value[key]) for name, key in text.items()}
    return [*map(_to_json, value)] if isinstance(value, list | tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        keys = {name: tuple(json.loads(name)) if name[:2] == '["' else name for name in value}
        return {keys[name]: _from_json(entry) for name, entry in value.items()}
    return tuple(map(_from_json, value)) if isinstance(value, list) else value

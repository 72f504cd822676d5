"""Atomic writing and safe loading of files."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens ``path.partial`` for writing, and renames it to ``path`` once it is on the disk.

    If writing fails, the partial file is removed, and an existing file ``path`` does not change.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # a link is not followed
        with partial.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def save_tensors(content: Any, path: str | Path) -> None:
    """Saves tensors, numbers and strings, in dictionaries, lists and tuples, with ``torch.save``.

    Raises:
        ValueError: if :func:`load_tensors` cannot load the content, such as a NumPy number.
    """
    with atomic_write(path) as file:
        torch.save(content, file)
        file.seek(0)
        try:  # on the meta device, which reads no data
            torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} could not be read again, so it was not written: it may only contain "
                f"tensors and Python's numbers and strings ({_reason(error)})"
            ) from error


def load_tensors(path: str | Path) -> Any:
    """Loads a file of :func:`save_tensors` to the CPU, without running code from it.

    Raises:
        ValueError: if the file is damaged, or a tensor is larger than the file.
    """
    size = Path(path).stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if sum(member.file_size for member in members) > size:
            raise ValueError("it is compressed, which torch.save never does")
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sizes(content, size)
    except OSError:
        raise
    except Exception as error:  # an unpickler may raise anything
        reason = _reason(error) if isinstance(error, pickle.UnpicklingError) else one_line(error)
        message = f"{path} is damaged or was not written by alm_torchrl: {reason}"
        raise ValueError(message) from error
    return content


def _check_sizes(content: Any, size: int) -> None:
    """Raises if a tensor is larger than the file, which has ``size`` bytes."""
    found, seen = [content], set()
    while found:
        value = found.pop()
        if isinstance(value, torch.Tensor):
            claimed = max(value.numel() * value.element_size(), value.untyped_storage().nbytes())
            if claimed > max(size, 1 << 20):  # a small tensor may be expanded
                raise ValueError(f"a tensor claims {claimed:,} bytes, and the file has {size:,}")
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            found += value.values() if isinstance(value, dict) else value


def _reason(error: Exception) -> str:
    """Returns the message of an unpickler without torch's advice."""
    found = re.search(r"(?:Unsupported|GLOBAL)[^\n.]*(?:\.\w+)*", str(error))
    return found[0] if found else type(error).__name__


def one_line(error: BaseException) -> str:
    """Returns the type and message of an error in one line of at most 303 characters.

    Examples:
        >>> one_line(KeyError("config"))
        "KeyError: 'config'"
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def set_aside(path: str | Path) -> Path:
    """Renames a file or folder to a free name that ends with ``.kept``, and returns it."""
    path, number = Path(path), 1
    kept = path.with_name(f"{path.name}.kept")
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.{number}.kept")
    return path.rename(kept)


def sync(path: str | Path) -> None:
    """Waits until a file or the entries of a folder are on the disk; does nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 checksum of a file in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

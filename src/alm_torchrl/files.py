"""Files that are either whole or not there."""

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

__all__ = [
    "atomic_write",
    "load_tensors",
    "one_line",
    "save_tensors",
    "set_aside",
    "sha256",
    "sync",
]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name once it is whole and on the disk, and not before.

    Args:
        path: the file; an existing one stays as it is until then, and if writing fails.

    Yields:
        The new file, for writing and for reading what was written; ``partial`` at the end of its
        name is this package's own, and what has it is replaced.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_write(folder / "note.txt") as file:
        ...     _ = file.write(b"whole")
        >>> [found.name for found in folder.iterdir()]
        ['note.txt']
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


def load_tensors(path: str | Path) -> Any:
    """Reads what :func:`save_tensors` wrote, to the CPU, without running any code stored in it.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        ValueError: if the file is damaged, or would take more memory than it has bytes.
        OSError: if it cannot be opened.
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
    except Exception as error:  # whatever an unpickler makes of foreign bytes
        reason = _reason(error) if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise ValueError(
            f"{path} is damaged or was not written by alm_torchrl: {reason}"
        ) from error
    return content


def _check_sizes(content: Any, size: int) -> None:
    """Raises if tensors claim more numbers than a file of this size (bytes) can hold."""
    found, seen = [content], set()
    while found:
        value = found.pop()
        if isinstance(value, torch.Tensor):
            claimed = max(value.numel() * value.element_size(), value.untyped_storage().nbytes())
            if claimed > max(size, 1 << 20):  # a small one may be expanded
                raise ValueError(f"a tensor claims {claimed:,} bytes, and the file has {size:,}")
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            found += value.values() if isinstance(value, dict) else value


def one_line(error: BaseException) -> str:
    """What an error says, on one line that is not endless.

    Args:
        error: the error.

    Examples:
        >>> one_line(KeyError("config"))
        "KeyError: 'config'"
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def save_tensors(content: Any, path: str | Path) -> None:
    """Writes what :func:`torch.save` writes, once it is known that it can be read again.

    Args:
        content: tensors, numbers and strings, in dictionaries, lists and tuples.
        path: the file; an existing one stays if this fails.

    Raises:
        ValueError: if something in it would not be read again, such as a number of NumPy's.
        OSError: if it cannot be written.
    """
    with atomic_write(path) as file:
        torch.save(content, file)
        file.seek(0)
        try:  # without the tensors' numbers
            torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} could not be read again, and was not written: it may hold tensors, "
                f"numbers and strings of Python's, and holds something else ({_reason(error)})"
            ) from error


def _reason(error: Exception) -> str:
    """What an unpickler complains of, without the advice that torch surrounds it with."""
    found = re.search(r"(?:Unsupported|GLOBAL)[^\n.]*(?:\.\w+)*", str(error))
    return found[0] if found else type(error).__name__


def set_aside(path: str | Path) -> Path:
    """Gives a file or folder a name that nothing else has, so that another can take its place.

    Args:
        path: what is in the way.

    Returns:
        Where it is now: beside it, with ``.kept`` at the end.

    Raises:
        OSError: if it cannot be renamed.
    """
    path, number = Path(path), 1
    kept = path.with_name(f"{path.name}.kept")
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.{number}.kept")
    return path.rename(kept)


def sync(path: str | Path) -> None:
    """Waits until a file, or what a folder says is in it, is on the disk.

    Windows opens no folder, and waits for no file that is open for reading: nothing is done there.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

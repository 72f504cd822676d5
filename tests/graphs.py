"""A stand-in for CUDA graphs, and a check of devices, for machines without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.synchronization import reads_on_the_host


class RecordedGraph:
    """The operators of a block, and the tensors that they read and wrote.

    Like a CUDA graph, it repeats the operators on the same memory: numbers of Python keep their
    values, and only tensors that are changed in place change. Random operators draw new numbers.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor):
                    old.detach().copy_(new)


class capture(TorchDispatchMode):  # noqa: N801 - like torch.cuda.graph
    """Records the operators of a block, and undoes them at its end."""

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self._changed: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> Any:
        self._random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.set_rng_state(self._random)
        for storage, before in self._changed.values():
            storage.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        # lift_fresh is torch.tensor(...), which copies from the host.
        if reads_on_the_host(func, args) or name == "lift_fresh":
            raise RuntimeError(f"operation {name} not permitted when stream is capturing")
        writes = [
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in func._schema.arguments
        ]
        for argument, write in zip(func._schema.arguments, writes, strict=True):
            if write:
                self._keep(kwargs.get(argument.name), args, func._schema.arguments.index(argument))
        out = func(*args, **kwargs)
        aliases = [r.alias_info is not None for r in func._schema.returns]
        if any(writes):
            self.graph.calls.append((func, args, kwargs, [None] * len(tree_leaves(out))))
        elif not any(aliases):  # a view shows new values by itself
            self.graph.calls.append((func, args, kwargs, tree_leaves(out)))
        return out

    def _keep(self, value: Any, args: Any, position: int) -> None:
        value = args[position] if position < len(args) else value
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._changed.setdefault(storage.data_ptr(), (storage, storage.clone()))


class _Nothing:
    """Does nothing."""

    def __init__(self, *args: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...


def replace_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes :class:`CapturedUpdate` use recorded graphs on the CPU."""
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, _Nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


class HostTensors(TorchDispatchMode):
    """Notes every operator that reads or makes a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(func._schema.name)
        return out

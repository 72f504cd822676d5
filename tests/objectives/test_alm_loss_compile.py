"""ALMLoss under torch.compile, in three precisions, and on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torchrl.objectives import SoftUpdate

from alm_torchrl.objectives import ALMLoss

TERMS = ["loss_world_model", "loss_reward", "loss_classifier", "loss_value", "loss_actor"]
Make = Callable[..., Any]

PRECISIONS = {
    "float64": (torch.float64, 1e-10),
    "float32": (torch.float32, 1e-4),
    "bfloat16": (torch.float32, 2e-2),  # weights in float32, matrix products in bfloat16
}


@pytest.fixture(autouse=True)
def no_compiled_code_left() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def autocast(precision: str, device: str = "cpu") -> contextlib.AbstractContextManager[Any]:
    if precision == "bfloat16":
        return torch.autocast(device, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def ended(td: TensorDict) -> TensorDict:
    """The batch with a termination, a time limit and padding in it."""
    td["next", "done"][0, 0] = td["next", "terminated"][0, 0] = True
    td["next", "done"][1, 0] = True
    td["validity_mask"] = torch.ones(td.shape, dtype=torch.bool)
    td["validity_mask"][2, 1:] = False
    return td


def with_gradients(loss: ALMLoss, value: Tensor) -> dict[str, Tensor]:
    loss.zero_grad()
    value.backward()
    grads = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **grads}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor to the tolerance, relative to its largest entry."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        floor = tolerance * value.abs().max().item()
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=floor + 1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend", "precision"),
    [
        ("loss_world_model", "aot_eager", "float64"),
        ("loss_reward", "inductor", "float32"),
        ("loss_classifier", "aot_eager", "bfloat16"),
        ("loss_value", "aot_eager", "float32"),
        ("loss_actor", "aot_eager", "float64"),
    ],
)
def test_a_compiled_term_equals_the_eager_one(
    make_loss: Make, make_windows: Make, name: str, backend: str, precision: str
) -> None:
    dtype, tolerance = PRECISIONS[precision]
    loss = make_loss(horizon=2, dtype=dtype)
    td = ended(make_windows(steps=2, dtype=dtype))
    rows = torch.arange(6) % 2 == 0
    loss.generated_rows = lambda _: rows
    method = getattr(loss, name.removeprefix("loss_") + "_loss")
    compiled = torch.compile(method, fullgraph=True, backend=backend)
    found = {}
    for way, call in (("eager", method), ("compiled", compiled)):
        with autocast(precision):
            value, metrics = call(td)
        found[way] = {**with_gradients(loss, value), **metrics}
    assert len(found["eager"]) > 4
    assert_close(found["compiled"], found["eager"], tolerance)


@pytest.mark.slow
def test_compiled_forward(make_loss: Make, make_windows: Make) -> None:
    """With its noise: equal to eager, fresh at each call, and compiled once for all settings."""
    loss = make_loss(horizon=1, dtype=torch.float32, deterministic=False)
    td = ended(make_windows(steps=1, dtype=torch.float32))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for scheduled in (False, True):
        if scheduled:
            loss.actor.noise.advance(60_000)
            loss.consistency_coeff = 0.7
        found = {}
        for way, call in (("eager", loss), ("compiled", compiled)):
            torch.manual_seed(0)
            out = call(td)
            total = sum(out[term] for term in TERMS)
            found[way] = {**with_gradients(loss, total), **out.detach()}
        assert_close(found["compiled"], found["eager"], 1e-5)
    assert not torch.equal(compiled(td)["loss_actor"], compiled(td)["loss_actor"])
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_new_loss_compiles_once(make_loss: Make, make_windows: Make) -> None:
    """The first call changes no state that the second one would be compiled for again."""
    loss, td = make_loss(horizon=1), make_windows(steps=1)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(loss, backend=counter)
    for _ in range(2):
        compiled(td)
    assert counter.frame_count == 1


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    flat = [torch.cat([v.flatten().double() for v in d.values()]) for d in (a, b)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0).item()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lower_precision_agrees_with_float64(
    make_loss: Make, make_windows: Make, precision: str
) -> None:
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[precision]
    for term in TERMS:
        found = {}
        for name in ("float64", precision):
            dtype, _ = PRECISIONS[name]
            loss, td = make_loss(dtype=torch.float64), make_windows()
            loss.to(dtype)
            td = ended(td.apply(lambda v, d=dtype: v.to(d) if v.is_floating_point() else v))
            torch.manual_seed(0)
            with autocast(name):
                out = loss(td)
            found[name] = with_gradients(loss, out[term])
            assert out[term].dtype == dtype
            assert all(value.isfinite().all() for value in out.values())
            assert all(p.grad is None or p.grad.dtype == dtype for p in loss.parameters())
        assert found[precision]["loss"].item() == pytest.approx(
            found["float64"]["loss"].item(), rel=tolerance, abs=tolerance
        )
        assert cosine(found[precision], found["float64"]) > 1 - tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_on_the_gpu(
    make_networks: Make, make_windows: Make, precision: str, compiled: bool
) -> None:
    dtype, _ = PRECISIONS[precision]
    networks = {name: network.to("cuda", dtype) for name, network in make_networks().items()}
    loss = ALMLoss(**networks).to("cuda")
    update = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    td = ended(make_windows(dtype=dtype)).to("cuda")
    call = torch.compile(loss, fullgraph=True) if compiled else loss
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    for _ in range(2):
        with autocast(precision, "cuda"):
            out = call(td)
        optimizer.zero_grad()
        sum(out[term] for term in TERMS).backward()
        optimizer.step()
        update.step()
        networks["actor"].noise.advance()
    assert all(value.device.type == "cuda" for value in out.values())
    assert all(value.isfinite().all() for value in out.values())
    for parameter, old in zip(loss.parameters(), before, strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, old)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_agree(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), ended(make_windows())
    rows = torch.arange(6) % 2 == 0
    loss.generated_rows = lambda state: rows.to(state["latent"].device)
    out = loss(td)
    wanted = {**with_gradients(loss, sum(out[term] for term in TERMS)), **out.detach()}
    loss.to("cuda")
    out = loss(td.to("cuda"))
    found = {**with_gradients(loss, sum(out[term] for term in TERMS)), **out.detach()}
    assert_close({name: value.cpu() for name, value in found.items()}, wanted, 1e-8)

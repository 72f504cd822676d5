"""One update: losses, clipping, skipped updates, compilation, and no host synchronization."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from alm_torchrl.training import ALMModule, CapturedUpdate, Update
from tests.synchronization import HostReads


@pytest.fixture
def make_update(make_module) -> Callable[..., tuple[Update, ALMModule]]:
    def make(**options) -> tuple[Update, ALMModule]:
        module = make_module(total_steps=200)
        optimizer = module.configure_optimizers()
        return Update(module.loss, optimizer, module.target_update, **options), module

    return make


def batches(module: ALMModule, count: int) -> list:
    experience = iter(module.experience)
    return [next(experience).clone() for _ in range(count)]


def double(batch):
    return batch.apply(lambda value: value.double() if value.is_floating_point() else value)


def gradients(module: ALMModule, batch) -> dict[str, list[torch.Tensor]]:
    """The gradients of the summed losses, for the parameters of each group."""
    losses = module.loss(batch)
    torch.stack([losses[key] for key in module.loss.out_keys]).sum().backward()
    groups = module.loss.parameter_groups()
    found = {name: [p.grad.clone() for p in group] for name, group in groups.items()}
    module.zero_grad()
    return found


def weights(module: ALMModule) -> list[torch.Tensor]:
    return [p.detach().clone() for group in module.loss.parameter_groups().values() for p in group]


@pytest.mark.parametrize("limit", [1e-2, 1e6])
def test_each_group_is_clipped_separately(make_update, limit: float) -> None:
    update, module = make_update(max_grad_norm=limit)
    (batch,) = batches(module, 1)
    torch.manual_seed(1)
    expected = gradients(module, batch)
    torch.manual_seed(1)
    metrics = update(batch)
    for group in update.optimizer.param_groups:
        grads = expected[group["name"]]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert metrics[f"grad_norm/{group['name']}"].item() == pytest.approx(norm.item(), rel=1e-5)
        factor = min(1.0, limit / norm.item())
        for p, grad in zip(group["params"], grads, strict=True):
            mean = update.optimizer.state[p]["exp_avg"]  # a tenth of the first gradient
            torch.testing.assert_close(mean, 0.1 * factor * grad, rtol=1e-4, atol=1e-9)
            assert p.grad is None


def test_targets_follow_the_weights_just_stepped(make_update) -> None:
    update, module = make_update()
    old = module.loss.target_qvalue_network_params.clone()
    update(*batches(module, 1))
    new = module.loss.qvalue_network_params
    expected = old.data.lerp(new.data, 0.005)
    for key, value in module.loss.target_qvalue_network_params.data.items(True, True):
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("group", ["world_model", "reward", "value", "actor"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_norm_changes_nothing_and_is_named(
    make_update, group: str, poison: float
) -> None:
    update, module = make_update()
    first, second, third = batches(module, 3)
    update(first)
    update.check()
    before = weights(module)
    parameter = module.loss.parameter_groups()[group][-1]
    hook = parameter.register_hook(lambda gradient: gradient * poison)
    update(second)
    hook.remove()
    assert all(map(torch.equal, weights(module), before))
    with pytest.raises(FloatingPointError, match=f"norm of the {group!r} loss is not finite"):
        update.check()
    update(third)  # the optimizer is sound, and what happened is not forgotten
    assert not any(map(torch.equal, weights(module), before))
    assert all(value.isfinite().all() for value in weights(module))
    with pytest.raises(FloatingPointError):
        update.check()


def test_an_update_reads_nothing_on_the_host(make_update) -> None:
    update, module = make_update()
    first, second = batches(module, 2)
    update(first)
    with HostReads() as reads:
        update(second)
    assert not reads.found
    with HostReads() as reads:
        update.check()
        module.loss.consistency_coeff.item()
    assert reads.found  # the detector works


def test_bfloat16_is_used_for_products_only(make_update) -> None:
    update, module = make_update(precision="bf16-mixed")
    seen = set()
    linear = next(m for m in module.loss.dynamics.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda *args: seen.add(args[-1].dtype))
    with torch.autocast("cpu", torch.float16):  # what surrounds the update does not matter,
        (batch,) = batches(module, 1)  # nor the casts that acting left in torch's cache
        metrics = update(batch)
    assert seen == {torch.bfloat16}
    assert metrics["loss_world_model"].dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    states = update.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}


def test_bfloat16_stays_close_to_full_precision(make_update) -> None:
    results = {}
    for precision in ("32-true", "bf16-mixed"):
        update, module = make_update(precision=precision)
        (batch,) = batches(module, 1)
        torch.manual_seed(1)
        results[precision] = update(batch)
    for key in ("loss_world_model", "loss_reward", "loss_value", "loss_actor"):
        exact, rounded = (results[p][key].item() for p in ("32-true", "bf16-mixed"))
        assert exact != rounded
        assert rounded == pytest.approx(exact, rel=0.05, abs=0.05)


@pytest.mark.slow
@pytest.mark.no_cover  # tracing doubles the compiler's time; others cover the same lines
def test_compiled_updates_equal_eager_ones(make_update) -> None:
    """A hundred updates in float64, with torch's own random numbers in both."""
    results = []
    for compiled in (False, True):
        update, module = make_update(compiled=compiled)
        data = [double(batch) for batch in batches(module, 100)]
        module.loss.double()
        torch.manual_seed(1)
        with torch._inductor.config.patch(fallback_random=True):
            losses = [update(batch)["loss_world_model"].item() for batch in data]
        update.check()
        results.append((torch.tensor(losses), weights(module)))
    (eager_losses, eager), (compiled_losses, traced) = results
    torch.testing.assert_close(compiled_losses, eager_losses, rtol=1e-6, atol=1e-6)
    for one, other in zip(traced, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("strict", [False, True])
def test_a_failed_compilation_warns_or_raises(make_update, monkeypatch, strict: bool) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler today")

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    update, module = make_update(compiled=True, strict=strict)
    first, second = batches(module, 2)
    if strict:
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler today"):
            update(first)
        return
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="torch.compile failed.*"):
        update(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(second)

    plain, other = make_update()
    first, second = batches(other, 2)
    torch.manual_seed(1)
    plain(first)
    plain(second)
    assert all(map(torch.equal, weights(module), weights(other)))


def test_a_failed_capture_warns_or_raises(make_update, monkeypatch) -> None:
    """Without a GPU, every capture fails."""

    class Nothing:
        def __init__(self, *args) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args) -> None: ...
        def wait_stream(self, stream) -> None: ...

    def refused(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    for name in ("Stream", "CUDAGraph", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "graph", refused)
    update, module = make_update(strict=False)
    captured = CapturedUpdate(update, warmup=1)
    data = batches(module, 3)
    captured(data[0])
    before = weights(module)
    with pytest.warns(UserWarning, match="cannot be captured.*not permitted"):
        captured(data[1])
    captured(data[2])
    assert not any(map(torch.equal, weights(module), before))

    strict, module = make_update()
    captured = CapturedUpdate(strict, warmup=1)
    captured(data[0])
    with pytest.raises(RuntimeError, match="not permitted"):
        captured(data[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_updates_equal_eager_ones(make_update, compiled: bool) -> None:
    """A hundred updates without noise, whose random numbers a graph draws in another order."""
    results = []
    for capture in (False, True):
        update, module = make_update()
        data = batches(module, 100)
        module = module.to("cuda", torch.float64)
        module.loss.deterministic_sampling_mode = "deterministic"
        optimizer = module.configure_optimizers()
        update = Update(module.loss, optimizer, module.target_update, compiled=compiled and capture)
        step = CapturedUpdate(update) if capture else update
        for batch in data:
            step(double(batch).to("cuda"))
        step.check()
        results.append(weights(module))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)

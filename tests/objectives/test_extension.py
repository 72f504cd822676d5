"""Seams of ALMLoss: overridden terms, auxiliary losses, generated rows, and a flat call chain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from alm_torchrl.modules import ContinuationModel
from alm_torchrl.objectives import ALMLoss

Make = Callable[..., Any]


class Reconstruction(nn.Module):
    """The squared error of a decoder at the first latent of each window."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 5)

    def forward(self, windows: TensorDictBase) -> Tensor:
        error = self.decoder(windows["latent"][:, 0]) - windows["observation"][:, 0]
        return error.square().mean(-1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_auxiliary_loss_trains_the_encoder_and_itself(
    make_loss: Make, make_windows: Make, reduction: str
) -> None:
    module = Reconstruction().double()
    loss = make_loss(auxiliary_losses={"reconstruction": module}, reduction=reduction)
    assert loss.out_keys[-1] == "loss_reconstruction"
    td = make_windows()
    out = loss(td)
    latent = loss.world_model_rollout(td)["latent"]
    expected = module(TensorDict(latent=latent, observation=td["observation"]))
    wanted = expected if reduction == "none" else expected.mean()
    torch.testing.assert_close(out["loss_reconstruction"], wanted)
    out["loss_reconstruction"].sum().backward()
    gradients = {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}
    trained = {n.split(".")[0] for n, gradient in gradients.items() if gradient.any()}
    assert trained == {"encoder_params", "auxiliary_losses"}
    world_model = {id(p) for p in loss.parameter_groups()["world_model"]}
    assert {id(p) for p in module.parameters()} <= world_model
    plain = make_loss(reduction=reduction)(td)
    for name, value in plain.items():
        torch.testing.assert_close(out[name], value)


def test_a_wrong_auxiliary_loss_is_refused(make_loss: Make, make_windows: Make) -> None:
    with pytest.raises(ValueError, match="has the name of another loss"):
        make_loss(auxiliary_losses={"reward": Reconstruction()})

    class Wrong(nn.Module):
        def forward(self, windows: TensorDictBase) -> Tensor:
            return windows["latent"].square()

    with pytest.raises(ValueError, match=r"'l2' has shape \(6, 3, 4\); return a scalar or one"):
        make_loss(auxiliary_losses={"l2": Wrong()})(make_windows())


TERMS = ["world_model", "reward", "classifier", "value", "actor"]


@pytest.mark.parametrize("name", TERMS)
def test_an_overridden_term_takes_effect(
    make_networks: Make, make_windows: Make, name: str
) -> None:
    def term(self: ALMLoss, tensordict: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = getattr(super(own, self), f"{name}_loss")(tensordict)
        return 0 * loss + 7, {"own": loss.detach()}

    own = type("Own", (ALMLoss,), {f"{name}_loss": term})
    out = own(**make_networks())(make_windows(dtype=torch.float32))
    assert out[f"loss_{name}"] == 7
    assert out["own"].isfinite()


def test_overridden_generated_rows_take_effect(make_networks: Make, make_windows: Make) -> None:
    class NoneGenerated(ALMLoss):
        def generated_rows(self, tensordict: TensorDictBase) -> Tensor:
            return torch.zeros(tensordict.shape, dtype=torch.bool)

    loss = NoneGenerated(**make_networks())
    with torch.no_grad():
        for parameter in loss.classifier_params.parameters():
            parameter.zero_()
        parameter.copy_(torch.tensor([-50.0, 50.0]))  # the last bias: "encoded"
    assert loss(make_windows(dtype=torch.float32))["classifier_accuracy"] == 1


def test_a_prepared_batch_serves_every_term(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows()
    batch = loss.prepare(td, steps=3)
    assert loss.prepare(batch) is batch
    for name in ("world_model", "reward", "value", "actor"):
        method = getattr(loss, f"{name}_loss")
        torch.testing.assert_close(method(batch)[0], method(td)[0])


@pytest.mark.slow
def test_extensions_compile(make_networks: Make, make_windows: Make) -> None:
    class Own(ALMLoss):
        def generated_rows(self, tensordict: TensorDictBase) -> Tensor:
            return torch.zeros(tensordict.shape, dtype=torch.bool)

        def reward_loss(self, tensordict: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = super().reward_loss(tensordict)
            return 2 * loss, metrics

    loss = Own(**make_networks(), auxiliary_losses={"reconstruction": Reconstruction()})
    td = make_windows(dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = {}
    for way, call in (("eager", loss), ("compiled", compiled)):
        torch.manual_seed(0)
        found[way] = call(td)
    for name, value in found["eager"].items():
        torch.testing.assert_close(found["compiled"][name], value, rtol=1e-4, atol=1e-5)


def test_the_deepest_call_chain_of_the_loss(make_networks: Make, make_windows: Make) -> None:
    networks = {**make_networks(), "continuation_model": ContinuationModel(4, 2, 8)}
    loss = ALMLoss(**networks, value_expansion=True, start_steps=2, consistency_level=1.0)
    td, stack, deepest = make_windows(dtype=torch.float32), [], []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if "alm_torchrl/objectives" not in code.co_filename or code.co_name.startswith("<"):
            return
        if event == "call":
            stack.append(code.co_name)
            deepest[:] = max(deepest, stack, key=len)
        elif event == "return":
            stack.pop()

    sys.setprofile(profile)
    try:
        loss(td)
    finally:
        sys.setprofile(None)
    assert deepest[0] == "forward"
    assert len(deepest) <= 6, deepest

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
from torchrl.data import Composite, Unbounded

from alm_torchrl.modules import (
    ContinuationModel,
    FixedScaleHead,
    LatentDynamics,
    LatentModule,
)
from alm_torchrl.objectives import ALMLoss, check_encoder
from alm_torchrl.training import StackedLoss

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


class Quantized(nn.Module):
    """Maps observations to the nearest code vector, and computes the losses of VQ-VAE."""

    def __init__(self, codes: int = 6) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.codebook = nn.Parameter(torch.randn(codes, 4))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layer(observation)
        distance = (features.detach().unsqueeze(-2) - self.codebook.detach()).square().sum(-1)
        code = self.codebook[distance.argmin(-1)]
        loss = (code - features.detach()).square() + 0.25 * (features - code.detach()).square()
        return features + (code - features).detach(), loss.sum(-1)


def quantized_networks(make_networks: Make) -> dict[str, nn.Module]:
    head = FixedScaleHead(0.5)
    encoder = LatentModule(Quantized(), ["observation"], head=head, extra_keys=["codebook_loss"])
    dynamics = LatentDynamics(4, 2, 8, head=head)
    return {**make_networks(), "encoder": encoder, "dynamics": dynamics}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_that_the_encoder_writes_trains_the_encoder(
    make_loss: Make, make_networks: Make, make_windows: Make, reduction: str
) -> None:
    networks, td = quantized_networks(make_networks), make_windows()
    options = {"networks": networks, "reduction": reduction}
    loss = make_loss(auxiliary_losses={"codebook": "codebook_loss"}, **options)
    assert (
        check_encoder(
            networks["encoder"],
            Composite(observation=Unbounded(5, dtype=torch.float64)),
            networks["dynamics"],
        )
        == 4
    )
    assert loss.out_keys[-1] == "loss_codebook"
    out, network = loss(td), networks["encoder"].network
    _, wanted = network(td["observation"][:, 0])
    wanted = wanted if reduction == "none" else wanted.mean()
    torch.testing.assert_close(out["loss_codebook"], wanted)
    expected = torch.autograd.grad(wanted.sum(), [*network.parameters()])
    out["loss_codebook"].sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        parameter.grad = None
    assert all(p.grad is None for p in loss.parameters())
    trained = {id(p) for p in loss.parameter_groups()["world_model"]}
    assert {id(p) for p in network.parameters()} <= trained
    # The codes reach the latent straight through, so that the codebook has no other gradient.
    sum(value.sum() for key, value in loss(td).items() if key in loss.out_keys[:-1]).backward()
    assert network.codebook.grad is None
    assert network.layer.weight.grad.any()


def test_a_loss_of_the_encoder_is_masked_and_changes_no_other_loss(
    make_loss: Make, make_networks: Make, make_windows: Make
) -> None:
    networks, td = quantized_networks(make_networks), make_windows()
    valid = torch.ones(6, 3, dtype=torch.bool)
    valid[:2] = False
    td["validity_mask"] = valid
    loss = make_loss(networks=networks, auxiliary_losses={"codebook": "codebook_loss"})
    plain = ALMLoss(**networks)
    plain.target_encoder_params.update_(loss.target_encoder_params)
    plain.target_qvalue_network_params.update_(loss.target_qvalue_network_params)
    plain.deterministic_sampling_mode = loss.deterministic_sampling_mode
    torch.manual_seed(0)
    out = loss(td)
    _, each = networks["encoder"].network(td["observation"][2:, 0])
    torch.testing.assert_close(out["loss_codebook"], each.mean())
    torch.manual_seed(0)
    for name, value in plain(td).items():
        torch.testing.assert_close(out[name], value)


def test_losses_of_the_encoders_of_several_seeds(make_networks: Make, make_windows: Make) -> None:
    losses = []
    for _ in range(2):
        networks = quantized_networks(make_networks)
        losses.append(ALMLoss(**networks, auxiliary_losses={"codebook": "codebook_loss"}))
    windows = torch.stack([make_windows(seed=seed, dtype=torch.float32) for seed in (1, 2)])
    wanted = [loss(td)["loss_codebook"] for loss, td in zip(losses, windows, strict=True)]
    torch.testing.assert_close(StackedLoss(losses)(windows)["loss_codebook"], torch.stack(wanted))


@pytest.mark.parametrize("given", ["codebok_loss", None, 3])
def test_an_entry_that_the_encoder_does_not_write_is_refused(
    make_networks: Make, given: Any
) -> None:
    networks = quantized_networks(make_networks)
    with pytest.raises(ValueError, match=r"'codebook' is neither a module nor an entry .*codebook"):
        ALMLoss(**networks, auxiliary_losses={"codebook": given})
    with pytest.raises(ValueError, match="has the name of another loss"):
        ALMLoss(**networks, auxiliary_losses={"value": "codebook_loss"})


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


@pytest.mark.slow
def test_a_loss_of_the_encoder_compiles(make_networks: Make, make_windows: Make) -> None:
    networks, td = quantized_networks(make_networks), make_windows(dtype=torch.float32)
    loss = ALMLoss(**networks, auxiliary_losses={"codebook": "codebook_loss"})
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(td)["loss_codebook"].item() == pytest.approx(loss(td)["loss_codebook"].item())


def test_the_deepest_call_chain_of_the_loss(make_networks: Make, make_windows: Make) -> None:
    networks = {**make_networks(), "continuation_model": ContinuationModel(4, 8)}
    loss = ALMLoss(**networks, consistency_level=1.0)
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

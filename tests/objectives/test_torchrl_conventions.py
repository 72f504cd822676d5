"""ALMLoss keeps the conventions of TorchRL's loss modules, as TorchRL tests them for its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from alm_torchrl.modules import ContinuationModel
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import StackedLoss, TargetUpdate, Update, make_optimizer

LOSSES = ["loss_world_model", "loss_reward", "loss_classifier", "loss_value", "loss_actor"]
METRICS_OF = {
    "loss_world_model": {"kl", "prior_entropy", "posterior_entropy", "latent_spread"},
    "loss_reward": set(),
    "loss_classifier": {"classifier_accuracy"},
    "loss_value": {"q_value", "target_value"},
    "loss_actor": {
        "imagined_reward",
        "imagined_log_ratio",
        "imagined_value",
        "imagined_return",
    },
}
Make = Callable[..., Any]


def by_keyword(td: TensorDict) -> dict[str, Any]:
    """The arguments of a call without a TensorDict."""
    return {
        "_".join(key): value
        for key, value in td.flatten_keys("/").items()
        for key in [key.split("/")]
    }


# ------------------------------------------------------------------------------------ selected keys


@pytest.mark.parametrize(
    "keys", [[key] for key in LOSSES] + [["loss_actor", "loss_world_model"], LOSSES[::-1]]
)
def test_only_selected_losses_are_computed(
    make_loss: Make, make_windows: Make, keys: list[str]
) -> None:
    """In the selected order, and without a call of the others."""
    loss, td = make_loss(), make_windows()
    wanted = loss(td)
    called = []
    for name in LOSSES:
        method = getattr(loss, name.removeprefix("loss_") + "_loss")
        loss.__dict__[method.__name__] = lambda batch, n=name, m=method: (
            called.append(n),
            m(batch),
        )[1]
    loss.world_model_rollout = lambda td, run=loss.world_model_rollout: (
        called.append("rollout"),
        run(td),
    )[1]
    loss.out_keys = keys
    out = loss(td)
    assert {*called} - {"rollout"} == {*keys}
    assert ("rollout" in called) == ("loss_world_model" in keys)
    assert {*out.keys()} == {*keys}.union(*map(METRICS_OF.get, keys))
    for key in keys:  # the classifier draws its rows at random
        if key != "loss_classifier":
            torch.testing.assert_close(out[key], wanted[key])
    found = loss(**by_keyword(td))
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(keys)
    for key, value in zip(keys, found, strict=True):
        if key != "loss_classifier":
            torch.testing.assert_close(value, wanted[key])


def test_select_out_keys_returns_nothing_else(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows()
    wanted = loss(td)
    before = td.clone()
    assert loss.select_out_keys("loss_actor", "loss_value") is loss
    assert loss.out_keys == ["loss_actor", "loss_value"]
    assert loss.out_keys_source == LOSSES
    out = loss(td)
    assert [*out.keys()] == ["loss_actor", "loss_value"]
    assert (td == before).all()
    torch.testing.assert_close(out["loss_actor"], wanted["loss_actor"])
    actor, value = loss(**by_keyword(td))
    assert actor == out["loss_actor"]
    assert value == out["loss_value"]
    twin = copy.deepcopy(loss)
    assert twin.out_keys == loss.out_keys
    loss.reset_out_keys()
    assert loss.out_keys == LOSSES
    assert {*loss(td).keys()} == {*wanted.keys()}
    assert [*twin(td).keys()] == ["loss_actor", "loss_value"]


def test_losses_of_first_transitions_accept_shorter_windows(
    make_loss: Make, make_windows: Make
) -> None:
    loss = make_loss(horizon=3)
    loss.out_keys = ["loss_value"]
    assert loss(make_windows(steps=2))["loss_value"].isfinite()
    loss.out_keys = ["loss_value", "loss_world_model"]
    with pytest.raises(ValueError, match="the windows are too short"):
        loss(make_windows(steps=2))


def test_optional_losses_can_be_selected(make_networks: Make, make_windows: Make) -> None:
    networks = {**make_networks(), "continuation_model": ContinuationModel(4, 2, 8)}
    loss = ALMLoss(**networks, consistency_level=1.0)
    SoftUpdate(loss, tau=0.005)
    assert loss.out_keys == [*LOSSES, "loss_continuation", "loss_multiplier"]
    loss.out_keys = ["loss_continuation", "loss_multiplier"]
    out = loss(make_windows(dtype=torch.float32))
    assert {*out.keys()} == {"loss_continuation", "loss_multiplier", "multiplier"}


@pytest.mark.parametrize("keys", [["loss_qvalue"], ["loss_value", "kl"], []])
def test_unknown_losses_cannot_be_selected(make_loss: Make, keys: list[str]) -> None:
    loss = make_loss()
    with pytest.raises(ValueError, match="cannot select .*; choose from loss_world_model, loss_"):
        loss.out_keys = keys
    assert loss.out_keys == LOSSES
    with pytest.raises((ValueError, RuntimeError), match="key"):
        loss.select_out_keys("loss_qvalue")


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_selection_trains_its_own_networks(
    make_networks: Make, make_windows: Make, seeds: int
) -> None:
    losses = [ALMLoss(**make_networks()) for _ in range(seeds)]
    for one in losses:
        one.out_keys = ["loss_value"]
    loss = StackedLoss(losses) if seeds > 1 else losses[0]
    update = Update(loss, make_optimizer(loss, 1e-2), TargetUpdate(loss, tau=0.1))
    before = copy.deepcopy(losses[0].state_dict())
    batch = make_windows(dtype=torch.float32)
    metrics = update(torch.stack([batch] * seeds) if seeds > 1 else batch)
    update.check()
    changed = {
        name.split("_params")[0]
        for name, value in losses[0].state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"qvalue_network", "target_qvalue_network"}
    assert (metrics["grad_norm/actor"] == 0).all()
    assert (metrics["grad_norm/value"] > 0).all()


@pytest.mark.slow
def test_a_selection_compiles(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(dtype=torch.float32), make_windows(dtype=torch.float32)
    loss.select_out_keys("loss_reward", "loss_value")
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(td)
    torch.testing.assert_close(found["loss_value"], loss(td)["loss_value"])

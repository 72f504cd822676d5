"""ALMLoss keeps the conventions of TorchRL's loss modules, as TorchRL tests them for its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler, TensorDictReplayBuffer
from torchrl.data.replay_buffers import RandomSampler, SamplerWithoutReplacement
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import ValueEstimators, _reduce

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
    return dict(td.flatten_keys("_").items())


class _Own(nn.Module):
    def forward(self, windows: TensorDict) -> torch.Tensor:
        return windows["latent"].square().mean((1, 2))


OWN = _Own()


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
    networks = {**make_networks(), "continuation_model": ContinuationModel(4, 8)}
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


# ------------------------------------------------------------------------ keys and value estimators


DEFAULTS = {
    "action": "action",
    "reward": "reward",
    "done": "done",
    "terminated": "terminated",
    "truncated": "truncated",
    "validity_mask": "validity_mask",
    "priority": "td_error",
    "priority_weight": "priority_weight",
    "imagined": "imagined",
}


def test_tensordict_keys(make_loss: Make) -> None:
    loss = make_loss()
    assert vars(loss.tensor_keys) == DEFAULTS == vars(loss.default_keys())
    for key, default in DEFAULTS.items():
        for name in ("other", ("nested", "other")):
            loss.set_keys(**{key: name})
            assert vars(loss.tensor_keys) == {**DEFAULTS, key: name}
            loss.set_keys(**{key: None})
            assert getattr(loss.tensor_keys, key) == default
    loss.set_keys(**dict.fromkeys(DEFAULTS, "other"))
    assert {*vars(loss.tensor_keys).values()} == {"other"}
    with pytest.raises(ValueError, match="unknown_key is not an accepted tensordict key"):
        loss.set_keys(unknown_key="other")


@pytest.mark.parametrize("estimator", [ValueEstimators.GAE, ValueEstimators.VTrace, "gae"])
def test_estimators_of_other_losses_are_refused(make_loss: Make, estimator: Any) -> None:
    with pytest.raises(NotImplementedError, match="for loss ALMLoss.*'TD0', 'TD1', 'TDLambda'"):
        make_loss().make_value_estimator(estimator)


@pytest.mark.parametrize("options", [{"gamma": 0.9}, {"lmbda": 0.9}, {"gamma": 0.9, "lmbda": 0}])
def test_discounts_belong_to_the_estimator(make_networks: Make, options: dict[str, float]) -> None:
    call = ", ".join(f"{name}=..." for name in options)
    with pytest.raises(TypeError, match=f"accept {call}; call loss.make_value_estimator.{call}"):
        ALMLoss(**make_networks(), **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        ALMLoss(**make_networks(), tau=0.1)


def test_reset_parameters_recursive(make_loss: Make, make_windows: Make) -> None:
    loss = make_loss()
    with torch.no_grad():
        for tensor in (*loss.parameters(), *loss.target_qvalue_network_params.values(True, True)):
            tensor += 1000
    before = copy.deepcopy(loss.state_dict())
    loss.reset_parameters_recursive()
    for name, value in loss.state_dict().items():
        if name.endswith(("weight", "bias")):
            assert (value != before[name]).all(), name
    assert all(value.isfinite() for value in loss(make_windows()).values())


# ------------------------------------------------------------------------------- prioritized replay


def weighted(td: TensorDict, weights: Any) -> TensorDict:
    shape = (-1, *[1] * (td.ndim - 1))
    weights = torch.as_tensor(weights, dtype=torch.float32).reshape(shape).expand(td.shape)
    return td.clone().set("priority_weight", weights)


WEIGHTS = [0.2, 1.0, 0.5, 0.7, 0.1, 0.9]


@pytest.mark.parametrize("short_windows", ["mask", "drop"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_multiply_the_losses_of_a_window(
    make_networks: Make, make_loss: Make, make_windows: Make, reduction: str, short_windows: str
) -> None:
    """As TorchRL's own reduction does it, over the windows that count."""
    options = {
        "networks": {**make_networks(), "continuation_model": ContinuationModel(4, 8)},
        "short_windows": short_windows,
        "consistency_level": 1.0,
        "auxiliary_losses": {"own": OWN},
    }
    td = make_windows()
    td["next", "done"][2, 1] = True
    loss = make_loss(reduction="none", **options)
    loss.generated_rows = lambda state: torch.arange(len(state)) % 2 == 0
    unreduced = loss(td)
    loss.reduction = reduction
    found = loss(weighted(td, WEIGHTS))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    for name in loss.out_keys:
        dropped = short_windows == "drop" and name in ("loss_world_model", "loss_multiplier")
        mask = torch.arange(6) != 2 if dropped else torch.ones(6, dtype=torch.bool)
        wanted = unreduced[name] * weights
        if reduction != "none":
            wanted = _reduce(unreduced[name], reduction, mask=mask, weights=weights)
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-8)
    for name in found.keys() - loss.out_keys:
        assert torch.equal(found[name], unreduced[name])


def test_equal_weights_change_nothing(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), make_windows()
    torch.manual_seed(0)
    wanted = loss(td)
    torch.manual_seed(0)
    for name, value in loss(weighted(td, [0.3] * 6)).items():
        torch.testing.assert_close(value, wanted[name])


def test_weights_undo_the_sampling_by_priority(make_loss: Make, make_windows: Make) -> None:
    """With beta = 1, each weighted mean is that of uniform sampling, up to its standard error."""
    loss, stored = make_loss(reduction="none"), make_windows(batch=64)
    stored["next", "reward"] *= torch.linspace(0, 3, 64).square()[:, None, None]
    loss.generated_rows = lambda state: torch.zeros(len(state), dtype=torch.bool)
    losses = loss(stored)
    # Large losses are sampled often, as priorities do it.
    chance = losses["loss_value"].detach() + 0.3
    rows = torch.multinomial(chance, 4096, True, generator=torch.Generator().manual_seed(0))
    weights = (chance.min() / chance)[rows]
    loss.reduction = "mean"
    weighted_means = loss(weighted(stored[rows], weights))
    biased_means = loss(stored[rows])
    for name in LOSSES:
        wanted, deviations = losses[name].mean(), losses[name][rows] - losses[name].mean()
        error = (weights * deviations).square().sum().sqrt() / weights.sum()
        assert (weighted_means[name] - wanted).abs() < 3 * error, name
        if name in ("loss_reward", "loss_value"):  # these depend on what the chance depends on
            assert (biased_means[name] - wanted).abs() > 10 * error, name


def test_no_counted_window_is_no_division_by_zero(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(short_windows="drop"), weighted(make_windows(), WEIGHTS)
    td["next", "done"][:, 0] = True
    value, _ = loss.world_model_loss(td)
    assert value == 0
    value.backward()
    assert all(p.grad is None or not p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize("use", ["auto", True, False])
def test_use_prioritized_weights(make_loss: Make, make_windows: Make, use: Any) -> None:
    loss, td = make_loss(use_prioritized_weights=use), make_windows()
    loss.out_keys = ["loss_reward", "loss_value"]
    plain = make_loss()(td)
    if use is True:
        with pytest.raises(KeyError, match="entry 'priority_weight' is missing from the batch"):
            loss(td)
    else:
        assert loss(td)["loss_value"] == plain["loss_value"]
        assert "td_error" not in td
    td = weighted(td, WEIGHTS)
    for name, value in loss(td).items():
        if name.startswith("loss"):
            assert (value == plain[name]) == (use is False)
    assert td["td_error"].shape == (6, 3)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3), (6, 3, 1)])
def test_the_weight_and_priority_of_the_first_transition(
    make_loss: Make, make_windows: Make, shape: tuple[int, ...]
) -> None:
    loss, td = make_loss(reduction="none"), make_windows()
    values = loss.action_values(loss.encode(td[:, 0]), td["action"][:, 0])
    following = loss.encode(td["next"][:, 0])
    target = loss.value(following, loss.act(following), loss.target_qvalue_network_params)
    target = td["next", "reward"][:, 0] + 0.99 * target
    errors = (values - target).abs().amax(-1)
    assert (values[:, 0] != values[:, 1]).all()
    wanted = loss(td)["loss_value"] * torch.tensor(WEIGHTS, dtype=torch.float64)
    batch = TensorDict(td.to_dict(), batch_size=[6])
    weights = torch.rand(shape)  # those after the first transition have no effect
    weights.view(6, -1)[:, 0] = torch.tensor(WEIGHTS)
    batch["priority_weight"] = weights
    before = batch.clone()
    torch.testing.assert_close(loss(batch)["loss_value"], wanted)
    error = batch.pop("td_error")
    assert error.shape == shape
    assert error.dtype == torch.float32
    assert not error.requires_grad
    for column in error.view(6, -1).unbind(-1):
        torch.testing.assert_close(column.double(), errors.detach(), rtol=1e-5, atol=1e-6)
    assert (batch == before).all()


def test_priorities_have_nested_keys_and_single_terms(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(), weighted(make_windows(), WEIGHTS)
    wanted = loss(td)
    loss.set_keys(priority=("replay", "error"), priority_weight=("replay", "weight"))
    other = td.exclude("td_error", "priority_weight").set(
        ("replay", "weight"), td["priority_weight"]
    )
    torch.testing.assert_close(loss(other)["loss_value"], wanted["loss_value"])
    assert torch.equal(other["replay", "error"], td["td_error"])
    loss.set_keys(priority=None, priority_weight=None)
    del td["td_error"]
    loss.reward_loss(td)
    assert "td_error" not in td
    loss.value_loss(td)
    assert torch.equal(other["replay", "error"], td["td_error"])


def test_weights_of_another_batch_are_refused(make_loss: Make, make_windows: Make) -> None:
    td = TensorDict(make_windows().to_dict())
    td["priority_weight"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"'priority_weight' has shape \(5,\); expected \[6\] or"):
        make_loss()(td)


def test_a_stack_of_seeds_takes_weights(make_networks: Make, make_windows: Make) -> None:
    losses = [ALMLoss(**make_networks()) for _ in range(2)]
    for one in losses:
        SoftUpdate(one, tau=0.1)
        one.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    td = make_windows(dtype=torch.float32)
    batch = torch.stack([weighted(td, WEIGHTS), weighted(td, WEIGHTS[::-1])])
    wanted = torch.stack(
        [one(td.clone())["loss_value"] for one, td in zip(losses, batch, strict=True)]
    )
    torch.testing.assert_close(StackedLoss(losses)(batch.clone())["loss_value"], wanted)


@pytest.mark.slow
def test_a_weighted_loss_compiles(make_loss: Make, make_windows: Make) -> None:
    loss, td = make_loss(dtype=torch.float32), weighted(make_windows(dtype=torch.float32), WEIGHTS)
    loss.select_out_keys("loss_reward", "loss_value")
    wanted, errors = loss(td), td.pop("td_error")
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(td)
    torch.testing.assert_close(found["loss_value"], wanted["loss_value"])
    torch.testing.assert_close(td["td_error"], errors)


# ------------------------------------------------------------------------------------ loss function


@pytest.mark.parametrize("name", ["smooth_l1", "l1"])
def test_the_loss_function_of_rewards_and_values(
    make_loss: Make, make_windows: Make, name: str
) -> None:
    td = make_windows(steps=1)
    td["next", "reward"] *= 3
    loss, plain = make_loss(loss_function=name, reduction="none"), make_loss(reduction="none")
    latent, action = loss.encode(td[:, 0]), td["action"][:, 0]
    reward = td["next", "reward"][:, 0]
    distance = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}[name]
    wanted = distance(loss.reward(latent, action), reward, reduction="none").squeeze(-1)
    torch.testing.assert_close(loss.reward_loss(td)[0], wanted)
    values = loss.action_values(latent, action)
    following = loss.encode(td["next"][:, 0])
    target = loss.value(following, loss.act(following), loss.target_qvalue_network_params)
    target = (reward + 0.99 * target).expand(-1, 2)
    wanted = distance(values, target, reduction="none").mean(-1)
    torch.testing.assert_close(loss.value_loss(td)[0], wanted)
    assert (loss.value_loss(td)[0] != plain.value_loss(td)[0]).all()
    torch.testing.assert_close(loss.actor_loss(td)[0], plain.actor_loss(td)[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_function": "huber"}, "loss_function='huber' is not one of l2, smooth_l1, l1"),
        (
            {"use_prioritized_weights": "yes"},
            "prioritized_weights='yes' is not one of auto, True, F",
        ),
    ],
)
def test_other_choices_are_refused(make_networks: Make, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ALMLoss(**make_networks(), **options)


# ---------------------------------------------------------------------------------- slices in a row


def steps_of_episodes(episodes: int, length: int) -> TensorDict:
    """Continuous observations, of which every episode starts elsewhere."""
    where = torch.randn(episodes, length + 1, 5, dtype=torch.float64)
    last = torch.zeros(episodes, length, 1, dtype=torch.bool)
    last[:, -1] = True
    return TensorDict(
        observation=where[:, :-1],
        action=torch.rand(episodes, length, 2, dtype=torch.float64),
        episode=torch.arange(episodes)[:, None].expand(-1, length),
        next=TensorDict(
            observation=where[:, 1:],
            reward=torch.randn(episodes, length, 1, dtype=torch.float64),
            done=last,
            terminated=torch.zeros_like(last),
            truncated=last.clone(),
            batch_size=[episodes, length],
        ),
        batch_size=[episodes, length],
    ).reshape(-1)


@pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_slices_in_a_row_are_refused(make_loss: Make, kind: Any, length: int) -> None:
    sampler = SliceSampler(slice_len=length, traj_key="episode")
    replay = kind(storage=LazyTensorStorage(60), sampler=sampler, batch_size=12 * length)
    replay.extend(steps_of_episodes(3, 20))
    loss, rows = make_loss(horizon=length), replay.sample()
    assert rows.shape == (12 * length,)
    says = r"has slices of \d+ consecutive steps, .*; call `.reshape\(-1, \d+\)` on it"
    with pytest.raises(ValueError, match=says):
        loss(rows)
    assert loss(rows.reshape(-1, length))["loss_world_model"].isfinite()
    loss.out_keys = ["loss_reward", "loss_value", "loss_actor"]  # these read single transitions
    assert loss(rows)["loss_value"].isfinite()
    assert make_loss(horizon=1)(rows)["loss_world_model"].isfinite()


@pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
@pytest.mark.parametrize("sampler", [RandomSampler, SamplerWithoutReplacement])
def test_transitions_are_no_slices(make_loss: Make, kind: Any, sampler: Any) -> None:
    data = steps_of_episodes(3, 20)
    replay = kind(storage=LazyTensorStorage(60), sampler=sampler(), batch_size=24)
    replay.extend(data)
    for rows in (replay.sample(), data, data[:20], data[7:51], data[:2], data[:1]):
        assert make_loss(horizon=3)(rows)["loss_world_model"].isfinite()
    in_order = kind(
        storage=LazyTensorStorage(60),
        sampler=SamplerWithoutReplacement(shuffle=False),
        batch_size=30,
    )
    in_order.extend(data)
    for _ in range(2):
        assert make_loss(horizon=3)(in_order.sample())["loss_world_model"].isfinite()


# ------------------------------------------------------------------------------ TorchRL's own tools


def test_the_actor_by_the_name_that_trainers_use(make_loss: Make) -> None:
    loss = make_loss()
    assert loss.actor_network is loss.actor
    assert not [name for name in loss.state_dict() if "actor_network" in name]
    assert copy.deepcopy(loss).actor_network is not loss.actor


def test_repr_is_short_and_says_what_is_inside(make_networks: Make) -> None:
    networks = {**make_networks(), "continuation_model": ContinuationModel(4, 8)}
    loss = ALMLoss(**networks, horizon=5, auxiliary_losses={"own": OWN})
    lines = repr(loss).splitlines()
    assert len(lines) <= 40
    for name, network in networks.items():
        count = sum(p.numel() for p in network.parameters())
        (line,) = [line for line in lines if line.startswith(f"  {name}: ")]
        assert type(network).__name__ in line
        assert line.endswith(f", {count:,} parameters")
    assert "  encoder: MLPEncoder(observation -> latent), 192 parameters" in lines
    assert "horizon=5" in repr(loss)
    assert "TDLambdaEstimator" in repr(loss)
    assert "  consistency_coeff=0.1, gamma=0.99, lmbda=0.95" in lines
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    assert "consistency_coeff=0.1, gamma=0.9\n" in repr(loss)
    assert "auxiliary own: _Own" in repr(loss)
    assert "out_keys: loss_world_model, " in repr(loss)

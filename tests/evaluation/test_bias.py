"""Returns and biases in cases with exact solutions."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import SoftUpdate

from alm_torchrl.evaluation import (
    UnknownReturnsError,
    monte_carlo_returns,
    rollout_for_bias,
    value_bias,
)
from alm_torchrl.evaluation.bias import normalized_bias
from alm_torchrl.modules import Actor, LatentModule, NoiseSchedule
from alm_torchrl.objectives import ALMLoss

GAMMA, LENGTH = 0.9, 6
REWARDS = torch.tensor([1.0, 3.0, -2.0, 4.0, 0.5, 2.0])


class Line(EnvBase):
    """States 0, 1, ...; each step increases the state and gives its reward.

    It terminates after the last reward, or pays 1 for ever (`endless`).
    """

    def __init__(self, endless: bool = False) -> None:
        super().__init__()
        self.endless, self.state = endless, 0
        self.observation_spec = Composite(observation=Unbounded((1,)))
        self.action_spec = Bounded(-1, 1, (1,))
        self.reward_spec = Unbounded((1,))
        self.actions: list[float] = []

    def _reset(self, tensordict=None, **kwargs):
        self.state = 0
        return TensorDict({"observation": torch.zeros(1)})

    def _step(self, tensordict):
        self.actions.append(tensordict["action"].item())
        reward = torch.ones(()) if self.endless else REWARDS[self.state]
        self.state += 1
        end = torch.tensor([not self.endless and self.state == LENGTH])
        return TensorDict(
            {
                "observation": torch.tensor([float(self.state)]),
                "reward": reward.reshape(1),
                "done": end,
                "terminated": end,
            }
        )

    def _set_seed(self, seed):
        pass


class Shift(nn.Module):
    """The state plus a number, as the location of a Normal within its soft bounds."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, state: Tensor, *_: Tensor) -> Tensor:
        loc = 30 * torch.atanh((state.round() + self.by) / 30)
        return torch.cat([loc, torch.full_like(loc, -5.0)], -1)


class Lookup(nn.Module):
    """A table of values by rounded state, followed by zeros."""

    def __init__(self, table: Tensor, outputs: int = 1, offset: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.cat([table, torch.zeros(30)]))
        self.outputs, self.offset = outputs, offset

    def forward(self, state: Tensor, *_: Tensor) -> Tensor:
        found = self.table[state.round().long()] + self.offset
        return torch.cat([found, *([found + 1.0] * (self.outputs - 1))], -1)


def true_values() -> Tensor:
    values = torch.zeros(LENGTH + 1)
    for t in reversed(range(LENGTH)):
        values[t] = REWARDS[t] + GAMMA * values[t + 1]
    return values[:-1]


def exact_loss(
    values: Tensor,
    rewards: Tensor,
    offset: float = 0.0,
    wrong: float = 0.0,
    continuation: Tensor | None = None,
) -> ALMLoss:
    """A loss whose model knows the line, up to the offsets given; with logits of continuation."""

    def module(network: nn.Module, out: str, *more: object) -> TensorDictModule:
        return TensorDictModule(network, ["latent", "action", *more], [out])

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, state: Tensor, *_: Tensor) -> Tensor:
            return self.weight.expand(*state.shape[:-1], 2)

    loss = ALMLoss(
        encoder=LatentModule(Shift(0.0), ["observation"]),
        dynamics=LatentModule(Shift(1.0), ["latent", "action"], latent_key=("next", "latent")),
        reward_model=module(Lookup(rewards, offset=wrong), "predicted_reward"),
        classifier=module(Even(), "logits", ("next", "latent")),
        qvalue_network=module(Lookup(values, 2, offset), "state_action_value"),
        actor=Actor(1, [-1.0], [1.0], 8, noise=NoiseSchedule(0.5, 0.5, 1), noise_clip=0.1),
        continuation_model=None if continuation is None else module(Lookup(continuation), "logit"),
        horizon=3,
    )
    SoftUpdate(loss, tau=0.005)
    loss.make_value_estimator(gamma=GAMMA)
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    return loss


def test_returns_and_which_are_known() -> None:
    """An episode that terminates, one cut at a time limit, and the cut end of the rollout."""
    torch.manual_seed(0)
    reward = torch.randn(2, 12, 1, dtype=torch.float64)
    done, terminated = torch.zeros(2, 2, 12, 1, dtype=torch.bool)
    done[0, 3] = terminated[0, 3] = True  # 0..3 terminates
    done[0, 8] = True  # 4..8 is truncated, 9..11 cut off
    terminated[1, 5] = False
    returns, counted = monte_carlo_returns(reward, done, terminated, 0.5, tail=0.1)
    ends = {0: [(0, 3), (4, 8), (9, 11)], 1: [(0, 11)]}
    for row, episodes in ends.items():
        for first, last in episodes:
            for t in range(first, last + 1):
                expected = sum(0.5 ** (k - t) * reward[row, k].item() for k in range(t, last + 1))
                assert returns[row, t].item() == pytest.approx(expected, abs=1e-6)
                known = (row, last) == (0, 3) or 0.5 ** (last + 1 - t) <= 0.1
                assert bool(counted[row, t]) == known, (row, t)
    assert counted[0, :4].all()
    assert counted[0].squeeze(-1).tolist()[4:] == [True, True] + 6 * [False]


def test_a_terminal_flag_without_done_ends_nothing() -> None:
    """Some environments keep the flag set: only `done` ends an episode."""
    reward, done = torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.bool)
    _, counted = monte_carlo_returns(reward, done, ~done, 0.9, tail=0.1)
    assert not counted.any()


@pytest.mark.parametrize(("gamma", "steps"), [(0.99, 349), (0.9, 34)])
def test_how_far_from_a_time_limit_a_state_must_be(gamma: float, steps: int) -> None:
    reward = torch.ones(1000, 1, dtype=torch.float64)
    never = torch.zeros(1000, 1, dtype=torch.bool)
    returns, counted = monte_carlo_returns(reward, never, never, gamma)
    assert counted.sum() == 1000 - steps + 1
    worst = returns[counted].min().item() * (1 - gamma)
    assert 0.97 <= worst < 0.975


def test_bias_is_normalized_by_the_mean_return() -> None:
    returns = torch.tensor([-10.0, -30.0])
    mean, std = normalized_bias(returns + torch.tensor([2.0, 6.0]), returns)
    assert mean.item() == pytest.approx(4 / 20)
    assert std.item() == pytest.approx(2 / 20)


@pytest.mark.parametrize("envs", [1, 3])
def test_exact_estimates_have_no_bias(envs: int) -> None:
    env = Line() if envs == 1 else SerialEnv(envs, Line)
    loss = exact_loss(true_values(), REWARDS)
    rollout = rollout_for_bias(loss, env, 4 * LENGTH)
    assert rollout.shape == (envs, 4 * LENGTH)
    bias = value_bias(loss, rollout)
    assert bias.states == envs * 4 * LENGTH
    assert bias.monte_carlo.item() == pytest.approx(true_values().mean().item(), rel=1e-5)
    for number in (bias.value, bias.value_std, bias.bound, bias.bound_std):
        assert abs(number.item()) < 1e-5


def test_a_bias_is_the_added_error() -> None:
    mean = true_values().mean().item()
    loss = exact_loss(true_values(), REWARDS, offset=0.6, wrong=0.2)
    bias = value_bias(loss, rollout_for_bias(loss, Line(), 2 * LENGTH))
    assert bias.value.item() == pytest.approx(0.6 / mean, rel=1e-4)
    assert abs(bias.value_std.item()) < 1e-5
    added = 0.2 * (1 + GAMMA + GAMMA**2) + 0.6 * GAMMA**3
    assert bias.bound.item() == pytest.approx(added / mean, rel=1e-4)
    # One wrong value changes mean and standard deviation.
    values = true_values()
    values[2] += 3.0
    loss = exact_loss(values, REWARDS)
    bias = value_bias(loss, rollout_for_bias(loss, Line(), 2 * LENGTH))
    errors = torch.zeros(LENGTH)
    errors[2] = 3.0 / mean
    assert bias.value.item() == pytest.approx(errors.mean().item(), rel=1e-4)
    assert bias.value_std.item() == pytest.approx(errors.std(correction=0).item(), rel=1e-4)


def test_a_time_limit_does_not_end_a_return() -> None:
    """A reward of 1 forever is worth 10, even if episodes are cut at 40 steps."""
    env = TransformedEnv(Line(endless=True), StepCounter(max_steps=40))
    loss = exact_loss(torch.full((60,), 10.0), torch.ones(60))
    bias = value_bias(loss, rollout_for_bias(loss, env, 80), tail=0.03)
    assert bias.states == 2 * 7
    assert 0 < bias.value.item() < 0.03
    with pytest.raises(UnknownReturnsError, match="play more steps, or raise `tail`"):
        value_bias(loss, rollout_for_bias(loss, env, 20), tail=0.03)


def test_the_policy_is_that_of_the_losses() -> None:
    """Noise of scale 0.5 is clipped at 0.1, as in the value target."""
    env = Line()
    loss = exact_loss(true_values(), REWARDS)
    with torch.no_grad():
        for parameter in loss.actor_params.parameters():
            parameter.zero_()
    rollout_for_bias(loss, env, 60)
    actions = torch.tensor(env.actions)
    assert len(actions) == 60
    assert actions.abs().max().item() == pytest.approx(0.1, abs=1e-6)
    assert (actions.abs() > 0.0999).float().mean() > 0.6

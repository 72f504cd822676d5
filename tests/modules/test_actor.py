"""The policy, its action ranges and its noise schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.modules import Actor, NoiseSchedule


def latents(size: int = 4, count: int = 2000) -> TensorDict:
    torch.manual_seed(0)
    return TensorDict(latent=3 * torch.randn(count, size), batch_size=[count])


def saturate(actor: Actor, value: float) -> Actor:
    """An actor whose network answers with one large number."""
    last = list(actor.parameters())[-1]
    with torch.no_grad():
        last.fill_(value)
    return actor


# ------------------------------------------------------------------------------------ the schedule


def test_schedule_is_linear_and_then_flat() -> None:
    noise = NoiseSchedule(start=1.0, end=0.1, num_steps=10)
    scales = [noise.scale.item()]
    for _ in range(15):
        noise.advance()
        scales.append(noise.scale.item())
    expected = [1.0 - 0.09 * min(step, 10) for step in range(16)]
    assert scales == pytest.approx(expected, rel=1e-5)


def test_schedule_advances_by_several_steps_in_place() -> None:
    noise, reference = NoiseSchedule(num_steps=1000), NoiseSchedule(num_steps=1000)
    buffer = noise.scale
    noise.advance(250)
    for _ in range(250):
        reference.advance()
    assert noise.scale is buffer
    assert noise.scale == reference.scale
    assert noise.step_count == 250


def test_schedule_counts_exactly_over_a_long_training() -> None:
    """A float32 counter would stand still at 16,777,216."""
    noise = NoiseSchedule(num_steps=100_000_000)
    noise.advance(2**24)
    for _ in range(3):
        noise.advance()
    assert noise.step_count.item() == 2**24 + 3


def test_schedule_resumes_from_its_state_dict() -> None:
    noise, resumed = NoiseSchedule(num_steps=10), NoiseSchedule(num_steps=10)
    noise.advance(4)
    resumed.load_state_dict(noise.state_dict())
    assert resumed.scale == noise.scale
    noise.advance()
    resumed.advance()
    assert resumed.scale == noise.scale == pytest.approx(0.55)


@pytest.mark.parametrize("kwargs", [{"num_steps": 0}, {"start": -0.1}, {"end": -1.0}])
def test_bad_schedules_are_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="num_steps >= 1 and scales >= 0"):
        NoiseSchedule(**kwargs)


# ----------------------------------------------------------------------------------- the range


def test_mean_spans_the_range() -> None:
    low, high = [-0.4, 0.0, -3.0], [0.4, 10.0, 1.0]
    td = latents()
    for value, border in ((50.0, high), (-50.0, low)):
        actor = saturate(Actor(4, low, high, 8), value)
        torch.testing.assert_close(actor(td.copy())["action_loc"][0], torch.tensor(border))
    actor = saturate(Actor(4, low, high, 8), 0.0)
    for parameter in actor.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(actor(td.copy())["action_loc"][0], torch.tensor([0.0, 5.0, -1.0]))


def test_mean_stays_in_plus_minus_one_as_the_authors_have_it() -> None:
    actor = saturate(Actor(4, [-0.4, -3.0], [0.4, 3.0], 8, scale_to_range=False), 50.0)
    td = actor(latents())
    torch.testing.assert_close(td["action_loc"][0], torch.ones(2))
    assert td["action"][:, 0].max() <= 0.4
    # The clip of 0.3 is in action units here, so that +-3 cannot be reached.
    assert td["action"][:, 1].max().item() == pytest.approx(1.3, abs=1e-5)


@pytest.mark.parametrize(
    ("low", "high"),
    [([-1.0, -1.0], [1.0, 1.0]), ([-0.4, -0.4], [0.4, 0.4]), ([-1.0, 0.0], [1.0, 10.0])],
)
def test_same_policy_whatever_the_range(low: list[float], high: list[float]) -> None:
    """In units of half the range, loc, noise and clip are those of a +-1 task."""
    reference = Actor(4, [-1.0, -1.0], [1.0, 1.0], 8)
    actor = Actor(4, low, high, 8)
    for mine, theirs in zip(actor.parameters(), reference.parameters(), strict=True):
        mine.data.copy_(theirs)
    half = (torch.tensor(high) - torch.tensor(low)) / 2
    middle = (torch.tensor(high) + torch.tensor(low)) / 2
    found, wanted = {}, {}
    for out, policy in ((found, actor), (wanted, reference)):
        torch.manual_seed(1)
        out["loss"] = policy(latents())
        torch.manual_seed(1)
        out["acting"] = policy.acting()(latents())
    for name, td in found.items():
        action = (td["action"] - middle) / half
        torch.testing.assert_close(action, wanted[name]["action"], rtol=0, atol=2e-5)
        torch.testing.assert_close(td["action_scale"] / half, wanted[name]["action_scale"])


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([-1.0], [1.0, 1.0], r"shapes \(1,\) and \(2,\)"),
        ([1.0], [1.0], "low < high"),
        ([float("-inf")], [1.0], "finite"),
        (-1.0, 1.0, "one entry per action dimension"),
    ],
)
def test_bad_ranges_are_refused(low: list[float], high: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Actor(4, low, high, 8)


# ----------------------------------------------------------------------------------- the noise


def test_noise_is_clipped_in_the_losses_and_not_when_acting() -> None:
    actor = Actor(4, [-9.0], [9.0], 8, noise=NoiseSchedule(1.0, 1.0), scale_to_range=False)
    td = actor(latents())
    assert (td["action"] - td["action_loc"]).abs().max().item() == pytest.approx(0.3, abs=1e-5)
    with set_exploration_type(ExplorationType.RANDOM):
        td = actor.acting()(latents())
    noise = td["action"] - td["action_loc"]
    assert noise.abs().max() > 2
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)


def test_no_clip_when_none_is_asked_for() -> None:
    actor = Actor(4, [-9.0], [9.0], 8, noise_clip=None, scale_to_range=False)
    td = actor(latents())
    assert (td["action"] - td["action_loc"]).abs().max() > 2


def test_acting_follows_the_parameters_and_the_schedule() -> None:
    actor = Actor(4, [-1.0], [1.0], 8, noise=NoiseSchedule(1.0, 0.0, 10))
    policy = actor.acting()
    assert {id(p) for p in policy.parameters()} == {id(p) for p in actor.parameters()}
    actor.noise.advance(10)
    with set_exploration_type(ExplorationType.RANDOM):
        td = policy(latents())
    assert td["action_scale"].abs().max() == 0
    torch.testing.assert_close(td["action"], td["action_loc"].clamp(-1 + 1e-6, 1 - 1e-6))
    saturate(actor, 50.0)
    assert (policy(latents())["action_loc"] == 1).all()


def test_exploration_type_decides_between_sample_and_mean() -> None:
    policy = Actor(4, [-1.0, -1.0], [1.0, 1.0], 8).acting()
    with set_exploration_type(ExplorationType.RANDOM):
        drawn = policy(latents())
    assert not torch.equal(drawn["action"], drawn["action_loc"])
    plain = policy(latents())  # as an evaluation, without a word
    torch.testing.assert_close(plain["action"], plain["action_loc"].clamp(-1 + 1e-6, 1 - 1e-6))
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.MEAN, ExplorationType.MODE):
        with set_exploration_type(mode):
            td = policy(latents())
        torch.testing.assert_close(td["action"], td["action_loc"].clamp(-1 + 1e-6, 1 - 1e-6))


def test_state_dict_holds_the_schedule() -> None:
    actor = Actor(4, [-1.0], [1.0], 8, noise=NoiseSchedule(num_steps=10))
    actor.noise.advance(5)
    other = Actor(4, [-1.0], [1.0], 8, noise=NoiseSchedule(num_steps=10))
    other.load_state_dict(actor.state_dict())
    assert other.noise.scale == actor.noise.scale == pytest.approx(0.55)
    assert other.noise.step_count == 5
    torch.manual_seed(2)
    wanted = actor(latents())["action"]
    torch.manual_seed(2)
    assert torch.equal(other(latents())["action"], wanted)


def test_a_deep_copy_has_a_schedule_of_its_own() -> None:
    actor = Actor(4, [-1.0], [1.0], 8, noise=NoiseSchedule(num_steps=10))
    snapshot = copy.deepcopy(actor)
    actor.noise.advance(10)
    assert snapshot.noise.scale == 1.0


def test_nested_keys() -> None:
    actor = Actor(4, [-1.0], [1.0], 8, latent_key=("a", "z"), action_key=("b", "u"))
    td = actor(TensorDict({("a", "z"): torch.randn(3, 4)}, batch_size=[3]))
    assert set(td.keys(True, True)) == {
        ("a", "z"),
        ("b", "u"),
        ("b", "u_loc"),
        ("b", "u_scale"),
    }


def test_a_range_per_dimension_moves_with_the_module() -> None:
    """On a GPU every draw would copy it from the host otherwise."""
    actor = Actor(4, [-1.0, -2.0], [1.0, 2.0], 8)
    for policy in (actor, actor.acting()):
        moved = policy.to("meta")
        kwargs = moved[-1].distribution_kwargs
        tensors = [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 2
        assert all(value.is_meta for value in tensors)


# ------------------------------------------------------------------------------- unusual ranges


@pytest.mark.parametrize(
    ("low", "high"), [([0.0], [1e-6]), ([0.0], [1e-9]), ([0.0, -1.0], [1e-6, 1.0])]
)
def test_actions_stay_inside_a_narrow_range(low: list[float], high: list[float]) -> None:
    actor = Actor(4, low, high, 8)
    acting = actor.acting()
    for value in (-100.0, 0.0, 100.0):
        saturate(actor, value)
        for mode in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
            with torch.no_grad(), set_exploration_type(mode):
                action = acting(latents())["action"]
            assert (action > torch.tensor(low)).all()
            assert (action < torch.tensor(high)).all()


@pytest.mark.parametrize(("low", "high"), [([5.0], [35.0]), ([-1.0, -9.0], [1.0, -1.0])])
def test_a_range_that_an_unscaled_mean_does_not_reach_is_refused(low, high) -> None:
    with pytest.raises(ValueError, match=r"reaches no part of the range.*set scale_to_range=True"):
        Actor(4, low, high, 8, scale_to_range=False)
    Actor(4, low, high, 8)


def test_ends_that_an_unscaled_mean_does_not_reach_are_said() -> None:
    with pytest.warns(UserWarning, match=r"never reaches the ends.*agent.scale_to_range=true"):
        Actor(4, [0.0], [35.0], 8, scale_to_range=False)
    Actor(4, [-0.4], [1.0], 8, scale_to_range=False)


def test_a_normalized_mean_does_not_saturate() -> None:
    low, high = [-1.0] * 3, [1.0] * 3
    torch.manual_seed(0)
    actor = Actor(4, low, high, 8, normalize_mean=True)
    plain = Actor(4, low, high, 8)
    plain.load_state_dict(actor.state_dict())
    td = latents()
    raw = actor[0].module.network(td["latent"])
    size = raw.abs().mean(-1, keepdim=True)
    assert size.min() < 1 < size.max()
    expected = torch.tanh(torch.where(size > 1, raw / size, raw))
    torch.testing.assert_close(actor.get_dist_params(td)["action_loc"], expected)
    small = (size < 1).squeeze(-1)
    torch.testing.assert_close(
        actor.get_dist_params(td)["action_loc"][small],
        plain.get_dist_params(td)["action_loc"][small],
    )
    saturated = saturate(actor, 1e4).get_dist_params(td)["action_loc"]
    torch.testing.assert_close(saturated, torch.tanh(torch.ones_like(saturated)), atol=1e-2, rtol=0)

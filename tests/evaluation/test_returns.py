"""Returns of whole episodes, from environments whose returns are known."""

import weakref

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, GymWrapper, RewardScaling, SerialEnv
from torchrl.envs.utils import ExplorationType, exploration_type

from alm_torchrl.data import make_collector
from alm_torchrl.envs import make_env, random_states, set_random_states
from alm_torchrl.evaluation import evaluate_policy


class Countdown(EnvBase):
    """Rewards 1, 2, 3, ... until `length` steps are done; each reset lengthens the episode."""

    def __init__(self, length: int = 3, growth: int = 0) -> None:
        super().__init__()
        self.length, self.growth, self.count = length, growth, 0
        self.observation_spec = Composite(observation=Unbounded((1,)))
        self.action_spec = Bounded(-1, 1, (1,))
        self.reward_spec = Unbounded((1,))
        self.resets = 0

    def _reset(self, tensordict=None, **kwargs):
        self.count = 0
        self.resets += 1
        return self._state()

    def _step(self, tensordict):
        self.count += 1
        done = torch.tensor([self.count >= self.length + self.growth * (self.resets - 1)])
        return self._state().update(
            {"reward": torch.tensor([float(self.count)]), "done": done, "terminated": done}
        )

    def _state(self) -> TensorDict:
        return TensorDict({"observation": torch.tensor([float(self.count)])})

    def _set_seed(self, seed):
        pass


POLICY = TensorDictModule(torch.zeros_like, in_keys=["observation"], out_keys=["action"])


def test_returns_are_sums_of_an_episodes_rewards() -> None:
    returns = evaluate_policy(Countdown(3, growth=1), POLICY, episodes=3)
    assert returns.tolist() == [1 + 2 + 3, 1 + 2 + 3 + 4, 1 + 2 + 3 + 4 + 5]


def test_each_of_several_environments_plays_its_first_episode() -> None:
    env = SerialEnv(3, [lambda: Countdown(2), lambda: Countdown(5), lambda: Countdown(3)])
    returns = evaluate_policy(env, POLICY, episodes=3)
    assert returns.tolist() == [3, 15, 6]


def test_more_episodes_than_environments_and_fewer() -> None:
    env = SerialEnv(2, [lambda: Countdown(2), lambda: Countdown(3)])
    assert evaluate_policy(env, POLICY, episodes=3).tolist() == [3, 6, 3]
    assert evaluate_policy(env, POLICY, episodes=1).tolist() == [3]


def test_an_episode_is_cut_at_max_steps_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"cut after 4 steps.*time limit.*evaluation.max_steps"):
        assert evaluate_policy(Countdown(10), POLICY, episodes=1, max_steps=4).tolist() == [10]


def test_a_long_episode_is_played_to_its_end() -> None:
    assert evaluate_policy(Countdown(2_500), POLICY, episodes=1).tolist() == [2_500 * 2_501 / 2]


def test_an_episode_that_never_ends_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alm_torchrl.evaluation.returns._MAX_STEPS", 250)
    env = SerialEnv(2, [lambda: Countdown(10**9), lambda: Countdown(3)])
    with pytest.warns(UserWarning, match="cut after 250 steps"):
        assert evaluate_policy(env, POLICY, episodes=2).tolist() == [250 * 251 / 2, 6]


@pytest.mark.filterwarnings("ignore:episodes were cut after 12 steps")
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("piece", [1, 4, 7])
def test_pieces_are_one_rollout(monkeypatch, num_envs: int, piece: int) -> None:
    """The returns, the steps and the resets are those of one long rollout."""

    def play(size: int) -> tuple[list[float], list[tuple[int, int]]]:
        monkeypatch.setattr("alm_torchrl.evaluation.returns._PIECE", size)
        torch.manual_seed(0)
        lengths = (3, 4, 12)[:num_envs]  # of several, the last is played to max_steps
        one = [Countdown(length, growth=2) for length in lengths]
        env = one[0] if num_envs == 1 else SerialEnv(num_envs, [lambda e=e: e for e in one])
        policy = TensorDictModule(torch.randn_like, in_keys=["observation"], out_keys=["action"])
        returns = evaluate_policy(env, policy, episodes=2 * num_envs, max_steps=12)
        return returns.tolist(), [(e.resets, e.count) for e in one]

    assert play(piece) == play(1000)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_no_step_follows_the_end_of_every_episode(num_envs: int) -> None:
    acted = 0

    def act(observation):
        nonlocal acted
        acted += 1
        return torch.zeros_like(observation)

    lengths = [150, 40, 120][:num_envs]
    env = SerialEnv(num_envs, [lambda n=n: Countdown(n) for n in lengths])
    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    returns = evaluate_policy(env, policy, episodes=num_envs)
    assert returns.tolist() == [n * (n + 1) / 2 for n in lengths]
    assert acted == 200  # the longest episode, and the rest of its piece


def test_a_long_episode_of_large_observations_is_not_kept() -> None:
    alive, most = weakref.WeakSet(), 0

    class Large(Countdown):
        def _state(self):
            nonlocal most
            frame = torch.zeros(1)
            alive.add(frame)
            most = max(most, len(alive))
            return TensorDict({"observation": frame})

    evaluate_policy(Large(1000), POLICY, episodes=1)
    assert most < 400


@pytest.mark.parametrize("mode", [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM])
def test_the_policy_sees_the_exploration_type(mode: ExplorationType) -> None:
    seen = set()

    def act(observation):
        seen.add(exploration_type())
        assert not torch.is_grad_enabled()
        return torch.zeros_like(observation)

    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    evaluate_policy(Countdown(2), policy, episodes=1, exploration_type=mode)
    assert seen == {mode}


def test_no_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_policy(Countdown(), POLICY, episodes=0)
    with pytest.raises(ValueError, match="max_steps must be at least 1, or None, got 0"):
        evaluate_policy(Countdown(), POLICY, max_steps=0)


@pytest.mark.parametrize("vectorized", ["sync", "async"])
def test_gymnasiums_vector_environments(vectorized: str) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
    vector = gymnasium.make_vec(
        "Pendulum-v1", num_envs=2, vectorization_mode=vectorized, vector_kwargs=mode
    )
    env = GymWrapper(vector)
    policy = TensorDictModule(lambda o: 0 * o[..., :1], ["observation"], ["action"])
    assert random_states(env) == []  # so that a checkpoint can be made
    set_random_states(env, [])
    for _ in range(2):
        assert evaluate_policy(env, policy, episodes=3).shape == (3,)
    for _ in make_collector(env, policy, frames_per_batch=2, total_frames=2):
        pass
    assert random_states(env) == []
    if vectorized == "async":
        with pytest.raises(ValueError, match=r"is closed.*a collector.*evaluate in another"):
            evaluate_policy(env, policy, episodes=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["reward", "observation"])
def test_a_non_finite_value_raises_with_the_environments_name(value: float, key: str) -> None:
    class Diverging(Countdown):
        def _step(self, tensordict):
            return super()._step(tensordict).set(key, torch.tensor([value]))

    for env in (Diverging(), make_env(Diverging), make_env(Diverging, num_envs=2)):
        with pytest.raises(
            FloatingPointError, match=f"non-finite .*{key}.* of .*Diverging: the sim"
        ):
            evaluate_policy(env, POLICY, episodes=1)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_scaled_reward_is_evaluated_in_the_environments_units(num_envs: int) -> None:
    """Training records the returns of its episodes in the same units."""
    scaling = [RewardScaling(loc=0.0, scale=0.1)]
    env = make_env(Countdown, num_envs=num_envs, transforms=scaling, length=150)
    assert evaluate_policy(env, POLICY, episodes=3).tolist() == [150 * 151 / 2] * 3
    scaled = evaluate_policy(env, POLICY, episodes=1, reward_key="reward")
    assert scaled.item() == pytest.approx(15 * 151 / 2)

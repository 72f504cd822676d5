"""The theorem behind ALM, on Markov decision processes in which everything can be enumerated.

States, actions and latents are finite, and rewards positive. The true return comes from a linear
system and the gap from sums over all trajectories, both in NumPy; the bound under test is made of
the package's own functions, and the test fails if one of them is altered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch import distributions as D

from alm_torchrl.evaluation import lower_bound
from alm_torchrl.objectives import functional

Array = NDArray[np.float64]
WAYS = ["log_ratio", "kl"]
reproducible = settings(deadline=None, derandomize=True, max_examples=40)


@dataclass
class Finite:
    """A process of S states and A actions, with an encoder, a model and a policy on Z latents."""

    start: Array  # [S]
    step: Array  # [S, A, S], the real dynamics
    reward: Array  # [S, A], positive
    encoder: Array  # [S, Z]
    model: Array  # [Z, A, Z]
    policy: Array  # [Z, A]
    gamma: float
    survives: Array | None = None  # [S, A], probability not to terminate; ``step`` is given that

    @property
    def continuation(self) -> Array:
        return np.ones_like(self.reward) if self.survives is None else self.survives

    def value(self) -> Array:
        """Normalized values ``[S, A]`` of the policy that acts on encodings."""
        states, actions = self.reward.shape
        acts = self.encoder @ self.policy  # [S, A]
        d = self.continuation
        chain = np.einsum("sa,sat,tb->satb", d, self.step, acts).reshape(states * actions, -1)
        system = np.eye(len(chain)) - self.gamma * chain
        received = (1 - self.gamma) * self.reward + self.gamma * (1 - d)  # 1 ever after the end
        return np.linalg.solve(system, received.ravel()).reshape(states, -1)

    def log_return(self) -> float:
        """The logarithm of the expected, normalized return."""
        return float(np.log(self.start @ (self.encoder @ self.policy * self.value()).sum(1)))

    def trajectories(self, steps: int) -> tuple[Array, Array, Array, Array, Array]:
        """All of them: states, latents, actions ``[N, steps + 1]``; probabilities of q and of p."""
        sizes = (len(self.start), self.encoder.shape[1], self.policy.shape[1])
        grid = np.indices(sizes * (steps + 1)).reshape(steps + 1, 3, -1).transpose(1, 2, 0)
        s, z, a = grid
        q = self.start[s[:, 0]] * self.encoder[s[:, 0], z[:, 0]] * self.policy[z, a].prod(1)
        q = q * self.step[s[:, :-1], a[:, :-1], s[:, 1:]].prod(1)
        p = q * self.encoder[s[:, 1:], z[:, 1:]].prod(1)
        q = q * self.model[z[:, :-1], a[:, :-1], z[:, 1:]].prod(1)
        kept = q > 0
        return s[kept], z[kept], a[kept], q[kept], p[kept]


def random_process(
    seed: int, sharpness: float = 1.0, *, ends: bool = False, **replaced: Array
) -> Finite:
    rng = np.random.default_rng(seed)
    states, actions, latents = rng.integers(1, 4), rng.integers(1, 3), rng.integers(1, 3)

    def table(*shape: int) -> Array:
        return rng.dirichlet(np.full(shape[-1], sharpness), shape[:-1]).clip(1e-12)

    parts = {
        "start": table(states),
        "step": table(states, actions, states),
        "reward": np.exp(rng.normal(0, 2, (states, actions))),
        "encoder": table(states, latents),
        "model": table(latents, actions, latents),
        "policy": table(latents, actions),
        "gamma": float(rng.uniform(0.05, 0.99)),
    }
    if ends:
        parts["survives"] = rng.beta(0.5, 0.5, (states, actions))
    return Finite(**{**parts, **replaced})


def bound(process: Finite, steps: int, way: str) -> float:
    """The bound by the package, as a mean over all trajectories of the model."""
    s, z, a, q, _ = process.trajectories(steps)
    encoder, model = torch.from_numpy(process.encoder), torch.from_numpy(process.model)
    e, m = encoder[s[:, 1:]], model[z[:, :-1], a[:, :-1]]  # [N, K, Z]
    if way == "log_ratio":
        chosen = torch.from_numpy(z[:, 1:]).unsqueeze(-1)
        logits = torch.cat([m.gather(-1, chosen), e.gather(-1, chosen)], -1).log()
        ratio = functional.log_ratio(logits)
    else:
        kl = functional.kl_divergence(D.Categorical(probs=m), D.Categorical(probs=e))
        ratio = -kl.unsqueeze(-1)
    reward = torch.from_numpy(process.reward[s[:, :-1], a[:, :-1]]).unsqueeze(-1)
    value = torch.from_numpy(process.value()[s[:, -1], a[:, -1]]).unsqueeze(-1)
    gamma = torch.tensor(process.gamma, dtype=torch.float64)
    survives = None
    if process.survives is not None:
        survives = torch.from_numpy(process.survives[s[:, :-1], a[:, :-1]]).unsqueeze(-1)
    found = functional.log_return_bound(reward, ratio, value, gamma, survives)
    return float((torch.from_numpy(q).unsqueeze(-1) * found).sum())


def gap(process: Finite, steps: int) -> float:
    """The gap by the derivation in docs/bound.md, from sums over trajectories of every length.

    It is the divergence of q from the posterior that weighs p by what is received, over the index
    J and the trajectory up to it or to its end, and of the divergences of model and encoder the
    share by which their weight exceeds the exact one.
    """
    gamma, log_z, found = process.gamma, process.log_return(), 0.0
    for j in range(steps + 1):
        weight = gamma**j * (1.0 if j == steps else 1 - gamma)
        received = process.value() if j == steps else process.reward
        s, _, a, q, p = process.trajectories(j)
        d = process.continuation[s, a]  # [N, j + 1]
        alive = d[:, :-1].prod(1)
        apart = np.log(q / p) + log_z
        found += weight * float((q * alive * (apart - np.log(received[s[:, -1], a[:, -1]]))).sum())
        # whoever terminates here receives 1, of logarithm 0, at every later index
        later = gamma ** (j + 1) if j < steps else 0.0
        found += later * float((q * alive * (1 - d[:, -1]) * apart).sum())
    s, z, a, q, _ = process.trajectories(steps)
    d = process.continuation[s, a]
    for t in range(steps):
        ratio = np.log(process.model[z[:, t], a[:, t], z[:, t + 1]])
        ratio -= np.log(process.encoder[s[:, t + 1], z[:, t + 1]])
        excess = gamma**t * d[:, :t].prod(1) * (1 - gamma * d[:, t])
        found += float((q * excess * ratio).sum())
    return found


def check_inequality(process: Finite, steps: int, way: str) -> None:
    assert bound(process, steps, way) <= process.log_return() + 1e-9


def check(process: Finite, steps: int, way: str) -> None:
    """The bound is below the return, and by exactly as much as it should be."""
    check_inequality(process, steps, way)
    expected = process.log_return() - gap(process, steps)
    assert bound(process, steps, way) == pytest.approx(expected, rel=1e-8, abs=1e-8)


@reproducible
@given(
    seed=st.integers(0, 2**31 - 1),
    steps=st.integers(0, 3),
    sharpness=st.sampled_from([0.2, 1.0, 5.0]),
    way=st.sampled_from(WAYS),
    ends=st.booleans(),
)
def test_the_bound_holds_and_its_gap_is_known(
    seed: int, steps: int, sharpness: float, way: str, ends: bool
) -> None:
    check(random_process(seed, sharpness, ends=ends), steps, way)


def test_beyond_the_last_end_the_horizon_makes_no_difference() -> None:
    """Every episode has two steps, so that nothing is left for a longer horizon to imagine."""
    step = np.array([[[0.0, 1.0]], [[1.0, 0.0]]])
    process = Finite(
        start=np.array([1.0, 0.0]),
        step=step,
        reward=np.array([[0.3], [2.0]]),
        encoder=np.eye(2),
        model=step,
        policy=np.ones((2, 1)),
        gamma=0.9,
        survives=np.array([[1.0], [0.0]]),
    )
    found = [bound(process, steps, "kl") for steps in (2, 3)]
    assert found[0] == pytest.approx(0.1 * np.log(0.3) + 0.09 * np.log(2.0))
    assert found[1] == pytest.approx(found[0])
    assert process.log_return() == pytest.approx(np.log(0.1 * 0.3 + 0.09 * 2.0 + 0.81))
    for steps in range(4):
        check(process, steps, "kl")


# ------------------------------------------------------------------------------------- equality


def constant_encoding(seed: int, reward: float) -> Finite:
    """Any stochastic process whose encodings say nothing, a model that knows, equal rewards."""
    process = random_process(seed)
    states, latents = process.encoder.shape
    encoding = process.encoder[0]
    process.encoder = np.broadcast_to(encoding, (states, latents)).copy()
    process.model = np.broadcast_to(encoding, process.model.shape).copy()
    process.reward = np.full_like(process.reward, reward)
    return process


def deterministic(seed: int, states: int = 3, actions: int = 2) -> Finite:
    """The latent is the state, the model exact, and so are dynamics and policy; rewards differ."""
    rng = np.random.default_rng(seed)
    step = np.eye(states)[rng.integers(0, states, (states, actions))]
    return Finite(
        start=np.eye(states)[0],
        step=step,
        reward=np.exp(rng.normal(0, 1, (states, actions))),
        encoder=np.eye(states),
        model=step,
        policy=np.eye(actions)[rng.integers(0, actions, states)],
        gamma=float(rng.uniform(0.2, 0.95)),
    )


def lottery(reward: float = 0.7, spread: float = 0.5) -> Finite:
    """0 -> 1 -> 2 or 3 by chance, for ever; the two differ in reward, but not in the mean."""
    step = np.zeros((4, 1, 4))
    step[0, 0, 1] = 1
    step[1, 0, 2:] = 0.5
    step[2, 0, 2] = step[3, 0, 3] = 1
    rewards = np.array([[reward], [reward], [reward - spread], [reward + spread]])
    encoder = np.eye(3)[[0, 1, 2, 2]]  # which of the two is hidden from the latent
    model = np.eye(3)[[1, 2, 2]][:, None]
    return Finite(np.eye(4)[0], step, rewards, encoder, model, np.ones((3, 1)), 0.8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("reward", [0.3, 1.0, 4.0])
def test_equality_with_a_model_that_knows_and_equal_rewards(
    way: str, steps: int, reward: float
) -> None:
    for seed in range(5):
        process = constant_encoding(seed, reward)
        assert process.log_return() == pytest.approx(np.log(reward))
        assert bound(process, steps, way) == pytest.approx(np.log(reward), abs=1e-9)
        check(process, steps, way)


@pytest.mark.parametrize("steps", range(4))
def test_a_deterministic_process_reaches_equality_at_the_value_alone(steps: int) -> None:
    """Nothing is random, and still a mean of logarithms is below the logarithm of the mean."""
    for seed in range(5):
        process = deterministic(seed)
        difference = process.log_return() - bound(process, steps, "kl")
        if steps == 0:
            assert difference == pytest.approx(0, abs=1e-9)
        else:
            s, _, a, _, _ = process.trajectories(steps)
            visited = process.reward[s[0, :-1], a[0, :-1]]
            last = process.value()[s[0, -1], a[0, -1]]
            unequal = np.ptp([*visited, last]) > 1e-6
            assert (difference > 1e-9) == unequal
        check(process, steps, "kl")


@pytest.mark.parametrize(("steps", "equal"), [(0, True), (1, True), (2, False), (3, False)])
def test_equality_ends_where_what_is_received_begins_to_differ(steps: int, equal: bool) -> None:
    """The exact value averages over the lottery; a horizon that ends in it takes logarithms."""
    process = lottery()
    difference = process.log_return() - bound(process, steps, "log_ratio")
    assert (difference < 1e-9) == equal
    check(process, steps, "log_ratio")


def test_a_wrong_model_costs_its_divergence() -> None:
    """With equal rewards the gap is the discounted sum of the KL divergences, and nothing else."""
    process = random_process(4)
    process.reward = np.full_like(process.reward, 2.0)
    s, z, a, q, _ = process.trajectories(2)
    expected = 0.0
    for t in range(2):
        m, e = process.model[z[:, t], a[:, t]], process.encoder[s[:, t + 1]]
        expected += process.gamma**t * float((q * (m * np.log(m / e)).sum(1)).sum())
    assert expected > 1e-3
    for way in WAYS:
        assert np.log(2) - bound(process, 2, way) == pytest.approx(expected)


# ------------------------------------------------------------------------------------- mutations


def rare_but_good(gamma: float = 0.9) -> Finite:
    """An encoding that is rare, but that the model seeks, since much is received after it."""
    encoder = np.tile([1 - 1e-5, 1e-5], (2, 1))
    policy = np.eye(2)
    reward = np.array([[1e-6, 1.0], [1e-6, 1.0]])
    step = np.tile(np.eye(2)[0], (2, 2, 1))
    model = np.full((2, 2, 2), 0.5)
    return Finite(np.eye(2)[0], step, reward, encoder, model, policy, gamma)


KL, RATIO = functional.kl_divergence, functional.log_ratio
DISCOUNTS, SURVIVAL = functional.discounts, functional.survival


def exponent(change: int) -> Callable[..., Tensor]:
    def mutated(reward: Tensor, value: Tensor, gamma: Tensor, _: Tensor | None) -> Tensor:
        steps = reward.shape[-2]
        return (DISCOUNTS(gamma, steps) * reward).sum(-2) + gamma ** (steps + change) * value

    return mutated


MUTATIONS: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "KL(e || m)": ("kl", "kl_divergence", lambda p, q: KL(q, p)),
    "no KL": ("kl", "kl_divergence", lambda p, q: 0 * KL(p, q)),
    "log m - log e": ("log_ratio", "log_ratio", lambda logits: -RATIO(logits)),
    "discount one late": ("kl", "discounts", lambda g, n: g * DISCOUNTS(g, n)),
    "discount one early": ("kl", "discounts", lambda g, n: DISCOUNTS(g, n) / g),
    "no discount": ("kl", "discounts", lambda g, n: torch.ones_like(DISCOUNTS(g, n))),
    "exponent K - 1": ("kl", "k_step_bound", exponent(-1)),
    "exponent K + 1": ("kl", "k_step_bound", exponent(1)),
}
PROCESSES = [
    *(random_process(seed) for seed in range(10)),
    *(constant_encoding(seed, reward) for seed in range(3) for reward in (0.3, 4.0)),
    rare_but_good(),
]


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_altered_bound_is_found_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By the exact gap in every random process, and some of them break the inequality itself."""
    way, function, mutated = MUTATIONS[name]
    for process in PROCESSES:
        check(process, 2, way)
    monkeypatch.setattr(functional, function, mutated)
    broken = 0
    for i, process in enumerate(PROCESSES):
        if i < 10 and process.encoder.shape[1] > 1:
            with pytest.raises(AssertionError):
                check(process, 2, way)
        try:
            check_inequality(process, 2, way)
        except AssertionError:
            broken += 1
    assert broken > 0, "the inequality alone would not have found it"


ENDS = {
    "every step is certain": lambda d: torch.ones_like(SURVIVAL(d)),
    "a step counts if it is survived itself": lambda d: torch.cat(
        [SURVIVAL(d)[..., 1:, :]] * 2, -2
    )[..., : d.shape[-2] + 1, :],
    "the value after K - 1 steps": lambda d: torch.cat(
        [SURVIVAL(d)[..., :-1, :], SURVIVAL(d)[..., -2:-1, :]], -2
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_continuation_in_another_place_is_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    processes = [random_process(seed, ends=True) for seed in range(10)]
    for process in processes:
        check(process, 2, "kl")
    monkeypatch.setattr(functional, "survival", ENDS[name])
    for process in processes:
        with pytest.raises(AssertionError):
            check(process, 2, "kl")


# ------------------------------------------------------------------------------ the loss's bound


def test_lower_bound_is_the_practical_form_of_one_rollout(make_loss, monkeypatch) -> None:
    loss = make_loss()
    latent = torch.randn(6, 4, dtype=torch.float64)
    action = torch.rand(6, 2, dtype=torch.float64)
    found = lower_bound(loss, latent, action)
    assert not found.requires_grad
    rollout = loss.imagine(latent, action)
    expected = 0.99**3 * rollout["next", "value"][:, -1]
    for t in range(3):
        step = rollout["reward"][:, t] + 0.1 * rollout["log_ratio"][:, t]
        expected = expected + 0.99**t * step
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(rollout["action"][:, 0], action)

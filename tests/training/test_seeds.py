"""Several seeds together: each learns, acts and is saved as if it were alone."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.agent import AgentConfig, ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    ALMModule,
    ExperienceStream,
    StackedAgent,
    StackedLoss,
    TargetUpdate,
    Update,
    find_checkpoint,
    make_optimizer,
    make_trainer,
    stack_seeds,
)
from tests.training.tiny import make_env

SEEDS = 3
CONFIG = AgentConfig(
    {"observation": 5}, (-1.0,) * 2, (1.0,) * 2, latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8
)


def make_seeds(noise: bool = False, count: int = SEEDS) -> tuple[list[ALMAgent], list[ALMLoss]]:
    agents, losses = [], []
    for seed in range(count):
        torch.manual_seed(seed)
        agents.append(ALMAgent(CONFIG).double())
        losses.append(ALMLoss(**agents[-1].networks()))
        if not noise:
            losses[-1].deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    return agents, losses


def make_windows(*shape: int) -> TensorDict:
    flag = torch.zeros(*shape, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": torch.randn(*shape, 5, dtype=torch.float64),
            "action": torch.rand(*shape, 2, dtype=torch.float64),
            "next": {
                "observation": torch.randn(*shape, 5, dtype=torch.float64),
                "reward": torch.randn(*shape, 1, dtype=torch.float64),
                "done": flag,
                "terminated": flag.clone(),
            },
        },
        shape,
    )


def make_update(loss: ALMLoss | StackedLoss, **options) -> Update:
    return Update(loss, make_optimizer(loss, 1e-2), TargetUpdate(loss, tau=0.1), **options)


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_losses_and_metrics_are_those_of_each_seed() -> None:
    _, losses = make_seeds()
    windows = make_windows(SEEDS, 6, 3)
    apart = [loss(windows[seed]).detach() for seed, loss in enumerate(losses)]
    together = StackedLoss(losses)(windows)
    assert set(together.keys()) == set(apart[0].keys())
    for key, value in together.items():
        if "classifier" not in key:  # which compares a random half
            expected = torch.stack([one[key] for one in apart])
            torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_updates_are_those_of_each_seed(monkeypatch, limit: float) -> None:
    """Thirty updates, with gradients clipped by the norm of each seed, and not."""
    rows = torch.arange(6) % 2 == 0
    monkeypatch.setattr(ALMLoss, "generated_rows", lambda self, tensordict: rows)
    batches = [make_windows(SEEDS, 6, 3) for _ in range(30)]
    _, apart = make_seeds()
    norms = []
    for seed, loss in enumerate(apart):
        update = make_update(loss, max_grad_norm=limit)
        norms.append([update(batch[seed])["grad_norm/value"].item() for batch in batches])
    agents, together = make_seeds()
    update = make_update(StackedLoss(together), max_grad_norm=limit)
    stacked_norms = torch.stack([update(batch)["grad_norm/value"] for batch in batches], 1)
    torch.testing.assert_close(stacked_norms, torch.tensor(norms, dtype=torch.float64))
    for one, other, agent in zip(apart, together, agents, strict=True):
        expected, found = one.state_dict(), other.state_dict()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8)
        assert torch.equal(
            next(agent.actor.parameters()), next(iter(other.actor_params.parameters()))
        )


def test_seeds_draw_random_numbers_of_their_own() -> None:
    agents, _ = make_seeds(count=1)
    twins = [copy.deepcopy(agents[0]) for _ in range(2)]
    loss = StackedLoss([ALMLoss(**agent.networks()) for agent in twins])
    TargetUpdate(loss, tau=0.1)
    windows = make_windows(1, 6, 3).expand(2, 6, 3)
    for key, value in loss(windows).items():
        if key.startswith("loss_") and key != "loss_classifier":
            assert value[0] != value[1], key


def test_a_compiled_stack_equals_an_eager_one() -> None:
    results = []
    windows = make_windows(SEEDS, 6, 3)
    for compiled in (False, True):
        torch._dynamo.reset()
        _, losses = make_seeds(noise=True)
        update = make_update(StackedLoss(losses))
        if compiled:
            update._losses = torch.compile(update._eager, backend="aot_eager")
        torch.manual_seed(0)
        for _ in range(3):
            metrics = update(windows)
        results.append(metrics["loss_world_model"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_a_non_finite_gradient_is_found_in_any_seed() -> None:
    _, losses = make_seeds()
    update = make_update(StackedLoss(losses))
    windows = make_windows(SEEDS, 6, 3)
    windows[1, 0, 0]["next", "reward"].fill_(float("nan"))
    update(windows)
    with pytest.raises(FloatingPointError, match="'reward', 'value' loss"):
        update.check()


@pytest.mark.parametrize("envs", [1, 4])
def test_every_seed_acts_in_its_own_environments(envs: int) -> None:
    agents, losses = make_seeds()
    agent, _ = stack_seeds(agents, losses)
    draws = 600  # the latent is drawn, so that only means over draws agree
    observations = torch.randn(SEEDS * envs, 5, dtype=torch.float64).repeat_interleave(draws, 0)
    state = TensorDict(observation=observations, batch_size=[SEEDS * envs * draws])
    with set_exploration_type(ExplorationType.RANDOM):
        noisy = agent.policy()(state.clone())["action"]
        assert noisy.shape == (SEEDS * envs * draws, 2)
        assert not torch.equal(noisy, agent.policy()(state.clone())["action"])
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        stacked = agent.policy()(state.clone())["action"]
        shares = [
            a.policy()(share.clone())["action"]
            for a, share in zip(agents, state.split(envs * draws), strict=True)
        ]
    means, alone = (
        actions.unflatten(0, (SEEDS, envs, draws)).mean(2)
        for actions in (stacked, torch.cat(shares))
    )
    torch.testing.assert_close(means, alone, rtol=0, atol=0.1)
    with pytest.raises(AssertionError):  # and the seeds differ
        torch.testing.assert_close(means.roll(1, 0), alone, rtol=0, atol=0.1)


def test_one_seed_is_not_stacked() -> None:
    agents, losses = make_seeds(count=1)
    assert stack_seeds(agents, losses) == (agents[0], losses[0])


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_moved_or_copied_seeds_are_trained(how: str) -> None:
    """The agents act with the stacked parameters that the optimizer changes."""
    agents, losses = make_seeds()
    agent, loss = stack_seeds(agents, losses)
    update = make_update(loss)
    if how == "moved":
        loss.float()
    else:
        agent, loss = copy.deepcopy((agent, loss))
        update = make_update(loss)
    dtype = torch.float32 if how == "moved" else torch.float64
    before = [[p.clone() for p in one.parameters()] for one in agent.agents]
    windows = make_windows(SEEDS, 6, 3)
    update(windows.apply(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf))
    for one, old in zip(agent.agents, before, strict=True):
        for new, parameter in zip(one.parameters(), old, strict=True):
            assert new.dtype == dtype
            assert not torch.equal(new, parameter)


def test_a_stack_is_unchanged_after_an_error() -> None:
    agents, losses = make_seeds()
    agent, loss = stack_seeds(agents, losses)
    weights = {name: value.clone() for name, value in loss.state_dict().items()}
    windows = make_windows(SEEDS, 6, 3)
    windows["observation"] = windows["next", "observation"] = torch.ones(SEEDS, 6, 3, 7)
    with pytest.raises(ValueError, match="encoder cannot read"):
        loss(windows)
    with pytest.raises(RuntimeError):
        agent.policy()(TensorDict(observation=torch.ones(SEEDS, 7), batch_size=[SEEDS]))
    assert all(torch.equal(value, weights[name]) for name, value in loss.state_dict().items())
    make_update(loss)(make_windows(SEEDS, 6, 3))


def test_seeds_of_different_sizes_are_refused() -> None:
    _, losses = make_seeds(count=2)
    other = ALMAgent(AgentConfig({"observation": 5}, (-1.0,) * 2, (1.0,) * 2, hidden_dim=8))
    with pytest.raises(ValueError, match="of the same sizes"):
        StackedLoss([losses[0], ALMLoss(**other.networks())])
    with pytest.raises(ValueError, match="one or more losses"):
        StackedLoss([])


def make_module(total_steps: int = 12, **options) -> ALMModule:
    torch.manual_seed(0)
    env = SerialEnv(2, make_env)
    agents = [ALMAgent.from_env(env, latent_dim=4, hidden_dim=8) for _ in range(2)]
    agent, loss = stack_seeds(agents, [ALMLoss(**a.networks()) for a in agents])
    collector = make_collector(env, agent.policy(), frames_per_batch=2, init_random_frames=16)
    replay = make_replay_buffer(200, batch_size=6, num_envs=2, per_env=True)
    experience = ExperienceStream(
        collector,
        replay,
        total_steps=total_steps,
        warmup_steps=8,
        noise=agent.noise,
        num_seeds=2,
    )
    return ALMModule(agent, loss, experience, SerialEnv(4, make_env), eval_episodes=2, **options)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_run_keeps_seeds_separate(tmp_path: Path, ema_decay: float) -> None:
    module = make_module(ema_decay=ema_decay)
    trainer = make_trainer(
        tmp_path,
        seed=5,
        num_seeds=2,
        title="test",
        eval_every=6,
        checkpoint_every=6,
        accelerator="cpu",
    )
    trainer.fit(module)
    assert trainer.global_step == 12
    assert module.experience.frames == 20
    assert [int(agent.noise.step_count) for agent in module.agents] == [11, 11]
    curves = [
        list(csv.DictReader((tmp_path / name / "curve.csv").open())) for name in ("seed5", "seed6")
    ]
    for seed, curve in zip(("5", "6"), curves, strict=True):
        assert [(r["step"], r["frames"], r["seed"]) for r in curve] == [
            ("6", "14", seed),
            ("12", "20", seed),
        ]
    for name, agent in zip(("seed5", "seed6"), module.evaluated_agents, strict=True):
        kept = ALMAgent.load(tmp_path / name / "agent_last.pt").state_dict()
        assert all(torch.equal(kept[key], value) for key, value in agent.state_dict().items())
    one, other = (nn.utils.parameters_to_vector(a.parameters()) for a in module.evaluated_agents)
    assert not torch.equal(one, other)

    start = find_checkpoint(tmp_path / "checkpoints")
    content = torch.load(start.state, weights_only=True)
    fresh = make_module(ema_decay=ema_decay)
    fresh.load_state_dict(content["state_dict"])
    stacked = fresh.loss.parameter_groups()["actor"][0]
    assert torch.equal(stacked, module.loss.parameter_groups()["actor"][0])


def test_a_stack_of_other_agents_is_refused() -> None:
    module = make_module()
    other = StackedAgent([copy.deepcopy(agent) for agent in module.agents])
    with pytest.raises(ValueError, match="does not share"):
        ALMModule(other, module.loss, module.experience, module.eval_env)

"""ALMTrainer: the noise, the numbers of a hand-written loop, resuming, and its messages."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchrl.checkpoint import Checkpoint
from torchrl.data import PrioritizedSampler
from torchrl.objectives import SoftUpdate

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import make_env
from alm_torchrl.objectives import ALMLoss, ImaginedReplay
from alm_torchrl.training import ALMTrainer, make_optimizer

WARMUP = 24
SIZES = {"latent_dim": 4, "hidden_dim": 16, "dynamics_hidden_dim": 16, "noise_steps": 100}


def make_parts(seed: int = 0, frames_per_batch: int = 4, **options):
    torch.manual_seed(seed)
    env = make_env("Pendulum-v1", seed=seed, max_episode_steps=10)
    agent = ALMAgent.from_env(env, **SIZES, **options)
    policy = agent.policy()
    frames = {"frames_per_batch": frames_per_batch, "init_random_frames": WARMUP}
    parts = {
        "collector": make_collector(env, policy, **frames),
        "loss_module": ALMLoss(**agent.networks()),
        "replay_buffer": make_replay_buffer(1000, batch_size=8),
    }
    return agent, parts


def make_trainer(total_frames: int = 60, seed: int = 0, frames_per_batch: int = 4, **options):
    agent, parts = make_parts(seed, frames_per_batch)
    options = {"progress_bar": False, "total_frames": total_frames, **options}
    return agent, ALMTrainer(**parts, **options)


def weights(loss: ALMLoss) -> list[torch.Tensor]:
    return [value.clone() for value in loss.state_dict().values() if torch.is_tensor(value)]


@pytest.mark.parametrize("frames_per_batch", [1, 4])
def test_the_noise_follows_the_frames_after_the_random_ones(frames_per_batch: int) -> None:
    agent, trainer = make_trainer(frames_per_batch=frames_per_batch)
    acted, seen = {}, {}

    def note(scales: dict[int, float]) -> None:
        scales[trainer.collected_frames] = agent.noise.scale.item()

    trainer.register_op("pre_steps_log", lambda _: note(acted))
    trainer.register_op("post_steps", lambda: note(seen))
    trainer.train()
    assert list(seen) == list(range(frames_per_batch, 61, frames_per_batch))
    for frames, scale in seen.items():
        expected = 1.0 - 0.9 * max(0, frames - WARMUP) / 100
        assert scale == pytest.approx(expected, abs=1e-6)
        if frames < 60:
            assert acted[frames + frames_per_batch] == scale
    assert trainer._optim_count == (60 - WARMUP) // frames_per_batch + 1


def test_imagined_episodes_are_an_operation_of_the_trainer() -> None:
    _, trainer = make_trainer()
    imagined = ImaginedReplay(trainer.loss_module, 5)
    trainer.register_op("process_optim_batch", imagined)
    trainer.train()
    assert imagined.get_extra_state()["calls"] == trainer._optim_count


def test_the_numbers_are_those_of_a_hand_written_loop() -> None:
    losses, clip, tau = [], 0.05, 0.1
    agent, parts = make_parts()
    loss = parts["loss_module"]
    trainer = ALMTrainer(
        **parts,
        total_frames=60,
        optimizer=make_optimizer(loss, 1e-3),
        target_net_updater=SoftUpdate(loss, tau=tau),
        optim_steps_per_batch=2,
        clip_norm=clip,
        progress_bar=False,
    )
    trainer.train()
    logged = trainer._log_dict

    other, parts = make_parts()
    loss = parts["loss_module"]
    optimizer = make_optimizer(loss, 1e-3)
    target_update = SoftUpdate(loss, tau=tau)
    frames = 0
    for data in parts["collector"]:
        parts["replay_buffer"].extend(data)
        frames += data.numel()
        if frames >= WARMUP:
            values = []
            for _ in range(2):
                out = loss(parts["replay_buffer"].sample())
                sum(out[key] for key in loss.out_keys).backward()
                for group in loss.parameter_groups().values():
                    norm = nn.utils.clip_grad_norm_(group, clip)
                    assert norm > clip
                optimizer.step()
                optimizer.zero_grad()
                target_update.step()
                values.append(out["loss_value"].item())
            losses.append(sum(values) / 2)
            if frames > WARMUP:
                other.noise.advance(data.numel())
        if frames == 60:
            break
    assert [value.item() for value in logged["loss_value"]] == pytest.approx(losses, rel=1e-5)
    for one, two in zip(weights(trainer.loss_module), weights(loss), strict=True):
        torch.testing.assert_close(one, two)
    assert agent.noise.step_count == other.noise.step_count == 60 - WARMUP


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.filterwarnings("ignore:The default Trainer checkpoint format:FutureWarning")
@pytest.mark.filterwarnings("ignore:The legacy CKPT_BACKEND trainer:DeprecationWarning")
def test_a_saved_trainer_continues(tmp_path: Path, unified: bool) -> None:
    def options():
        checkpoint = {"checkpoint": Checkpoint()} if unified else {}
        return {"save_trainer_file": tmp_path / "trainer", **checkpoint}

    first, saved = make_trainer(40, **options())
    saved.train()  # the end saves
    second, trainer = make_trainer(60, seed=1, **options())
    trainer.load_from_file(tmp_path / "trainer")
    assert trainer.collected_frames == 40
    assert trainer._optim_count == saved._optim_count
    for one, two in zip(weights(saved.loss_module), weights(trainer.loss_module), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    steps = [state["step"] for state in trainer.optimizer.state.values()]
    assert steps
    assert all(step == saved._optim_count for step in steps)
    assert len(trainer.replay_buffer) == 40
    stored = [buffer[:]["observation"] for buffer in (saved.replay_buffer, trainer.replay_buffer)]
    torch.testing.assert_close(*stored, rtol=0, atol=0)
    assert second.noise.step_count == first.noise.step_count == 40 - WARMUP

    trainer.train()
    assert trainer.collected_frames == 60
    assert second.noise.step_count == 60 - WARMUP
    assert len(trainer.replay_buffer) == 60
    assert torch.equal(second.noise.scale, trainer.loss_module.actor.noise.scale)


def test_training_changes_the_policy_and_logs() -> None:
    agent, trainer = make_trainer(44)
    before = [p.detach().clone() for p in agent.policy().parameters()]
    trainer.train()
    assert not any(map(torch.equal, before, agent.policy().parameters()))
    logged = trainer._log_dict
    assert {"reward", "loss_actor", "imagined_return", "grad_norm/actor"} <= {*logged}
    assert len(logged["episode_return"]) == 4
    rewards = trainer.replay_buffer[:10]["next", "reward"].sum().item()
    assert logged["episode_return"][0] == pytest.approx(rewards, rel=1e-5)
    assert logged["noise_scale"][0] == 1
    assert logged["noise_scale"][-1] == pytest.approx(1 - 0.9 * 16 / 100)  # of the last batch


def test_the_collector_gets_the_weights_after_the_noise(monkeypatch) -> None:
    agent, trainer = make_trainer(40)
    sent = []
    monkeypatch.setattr(
        type(trainer.collector), "update_policy_weights_",
        lambda self: sent.append((trainer._optim_count, agent.noise.step_count.item())),
    )  # fmt: skip
    trainer.train()
    assert sent[0] == (0, 0)  # of a loaded checkpoint
    assert sent[-3:] == [(3, 8), (4, 12), (5, 16)]


@pytest.mark.slow
def test_workers_act_with_the_new_weights() -> None:
    agent, parts = make_parts()
    actions = {}
    parts["collector"] = make_collector(
        partial(make_env, "Pendulum-v1"), agent.policy(), kind="multi", num_workers=2,
        frames_per_batch=4, init_random_frames=8,
    )  # fmt: skip
    parts["replay_buffer"] = make_replay_buffer(100, batch_size=4, num_envs=2)
    trainer = ALMTrainer(**parts, total_frames=16, progress_bar=False)
    agent.noise.start = agent.noise.end = 0.0

    @torch.no_grad()
    def silence(batch) -> None:
        actions[trainer.collected_frames] = batch["action"].clone()
        if trainer.collected_frames == 12:  # the hooks after this one advance and send
            trainer.optim_steps = lambda batch: None
            for parameter in agent.actor.parameters():
                parameter.zero_()

    trainer.register_op("pre_steps_log", silence)
    trainer.train()
    assert (actions[12] != 0).all()
    assert (actions[16] == 0).all()


def test_running_statistics_of_the_encoder_are_updated() -> None:
    agent, parts = make_parts(network_kwargs={"encoder": {"normalize": True}})
    ALMTrainer(**parts, total_frames=40, progress_bar=False).train()
    counts = [b for name, b in agent.encoder.named_buffers() if name.endswith("count")]
    assert [count.item() for count in counts] == [40]


def test_priorities_are_updated_after_each_update() -> None:
    _, trainer = make_trainer(40)
    replay, batches = trainer.replay_buffer, []
    replay.update_tensordict_priority = lambda batch: batches.append(batch.shape)
    trainer.train()
    assert not batches  # the buffer is not prioritized
    _, trainer = make_trainer(40)
    sampler = PrioritizedSampler.__new__(PrioritizedSampler)  # its C++ trees may not load
    prioritized = SimpleNamespace(
        sampler=sampler, update_tensordict_priority=lambda batch: batches.append(batch.shape)
    )
    trainer.replay_buffer = prioritized
    trainer.optimization_stepper.step(trainer, replay.sample())
    assert batches == [(8, 3)]


def test_a_non_finite_gradient_stops_the_training() -> None:
    agent, trainer = make_trainer()
    next(agent.actor.parameters()).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="the 'actor' loss is not finite"):
        trainer.train()


def test_a_policy_of_other_networks_is_refused() -> None:
    _, parts = make_parts()
    _, others = make_parts(seed=1)
    with pytest.raises(ValueError, match="the policy of the collector does not share the actor"):
        ALMTrainer(**{**parts, "collector": others["collector"]}, total_frames=60)


def test_the_trainer_needs_no_lightning() -> None:
    program = """
import sys
sys.modules["lightning"] = None
from alm_torchrl.training import ALMTrainer
from alm_torchrl import training
assert "make_trainer" in dir(training)
try:
    from alm_torchrl.training import make_trainer
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        result.stdout.strip() == "make_trainer needs lightning: pip install 'alm-torchrl[recipes]'"
    )


def test_training_emits_no_warning_of_its_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        make_trainer(28)[1].train()

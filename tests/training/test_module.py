"""Training on Lightning: updates, evaluations, errors, signals and saved files."""

from __future__ import annotations

import csv
import re
import signal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchrl.envs import Transform, TransformedEnv

from alm_torchrl.agent import ALMAgent
from alm_torchrl.envs import EnvironmentFailedError
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    ALMModule,
    Update,
    find_checkpoint,
    make_trainer,
)
from alm_torchrl.training.callbacks import StopOnSignal, Video
from tests.training.tiny import make_env

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def trainer(folder: Path, eval_every: int = 6, **options) -> L.Trainer:
    return make_trainer(
        folder,
        seed=3,
        title="test",
        eval_every=eval_every,
        checkpoint_every=eval_every,
        accelerator="cpu",
        **options,
    )


def newest_state(folder: Path) -> dict:
    return torch.load(find_checkpoint(folder / "checkpoints").state, weights_only=True)


def test_a_run_learns_and_writes_all_its_files(make_module, tmp_path: Path) -> None:
    module = make_module(log_every=5)
    before = {name: p.clone() for name, p in module.loss.named_parameters()}
    target = module.loss.target_encoder_params.clone()
    run = trainer(tmp_path)
    run.fit(module)

    unchanged = [n for n, p in module.loss.named_parameters() if torch.equal(p, before[n])]
    assert not unchanged
    moved = module.loss.target_encoder_params
    assert all(
        (a != b).any()
        for a, b in zip(moved.values(True, True), target.values(True, True), strict=True)
    )
    assert run.global_step == 12
    assert module.experience.frames == 20
    assert int(module.agent.noise.step_count) == 11  # advanced after every update but the last

    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [(row["step"], row["frames"], row["seed"]) for row in rows] == [
        ("6", "14", "3"),
        ("12", "20", "3"),
    ]
    assert float(rows[-1]["return"]) == pytest.approx(
        float(run.callback_metrics["return"]), abs=0.01
    )
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names >= {
        "curve.png",
        "agent_best.pt",
        "agent_last.pt",
        "checkpoints/update-0000000006/state.ckpt",
        "checkpoints/update-0000000012/state.ckpt",
        "checkpoints/update-0000000012/manifest.json",
        "logs/csv/metrics.csv",
    }
    metrics = list(csv.DictReader((tmp_path / "logs/csv/metrics.csv").open()))
    losses = [row for row in metrics if row["train/loss_actor"]]
    assert [row["step"] for row in losses] == ["1", "6", "11"]
    assert all(float(row[f"train/{key}"]) != 0 for row in losses for key in module.loss.out_keys)
    assert ALMAgent.load(tmp_path / "agent_last.pt").config == module.agent.config


def test_a_checkpoint_restores_loss_and_optimizer(make_module, tmp_path: Path) -> None:
    module = make_module()
    trainer(tmp_path).fit(module)
    content = newest_state(tmp_path)
    fresh = make_module()
    fresh.load_state_dict(content["state_dict"])
    for name, value in module.loss.state_dict().items():
        assert torch.equal(value, fresh.loss.state_dict()[name]), name
    optimizer = fresh.configure_optimizers()
    optimizer.load_state_dict(content["optimizer_states"][0])
    assert {group["name"] for group in optimizer.param_groups} == set(fresh.loss.parameter_groups())


def test_an_average_of_the_weights_is_evaluated_and_saved(
    make_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(ema_decay=0.75)
    played = []
    monkeypatch.setattr(
        "alm_torchrl.training.module.evaluate_policy",
        lambda env, policy, episodes, **_: played.append(policy) or torch.zeros(episodes),
    )
    expected = {name: p.clone() for name, p in module.agent.named_parameters()}

    class Follow(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            for name, newest in pl_module.agent.named_parameters():
                expected[name] = 0.75 * expected[name] + 0.25 * newest.detach()

    run = trainer(tmp_path / "average", eval_every=12)
    run.callbacks.insert(0, Follow())
    run.fit(module)
    average = module.evaluated_agents[0]
    saved = ALMAgent.load(tmp_path / "average/agent_last.pt")
    assert int(average.noise.step_count) == int(module.agent.noise.step_count) == 11
    assert {id(p) for p in played[-1].parameters()} <= {id(p) for p in average.parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(average.get_parameter(name), value, msg=name)
        assert torch.equal(saved.get_parameter(name), average.get_parameter(name)), name

    plain = make_module()
    trainer(tmp_path / "plain", eval_every=12).fit(plain)
    for learned, same in zip(module.agent.parameters(), plain.agent.parameters(), strict=True):
        assert torch.equal(learned, same)

    fresh = make_module(ema_decay=0.75)
    fresh.load_state_dict(newest_state(tmp_path / "average")["state_dict"])
    for kept, value in zip(fresh.average.parameters(), average.parameters(), strict=True):
        assert torch.equal(kept, value)


class Broken(Transform):
    """Raises or returns a non-finite reward in an evaluation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def _step(self, tensordict, next_tensordict):
        if self.how == "raises":
            raise AttributeError("the joint came off")
        next_tensordict["reward"].fill_(float(self.how))
        return next_tensordict


@pytest.mark.parametrize("how", ["raises", "nan", "inf"])
def test_a_failing_evaluation_stops_the_run(make_module, tmp_path: Path, how: str) -> None:
    module = make_module(eval_env=TransformedEnv(make_env(), Broken(how)))
    cause = r"non-finite value in \('next', 'reward'\)"
    if how == "raises":
        cause = "AttributeError: the joint came off"
    says = rf"the evaluation in ContinuousActionVecMockEnv failed after frame 14: .*{cause}"
    with pytest.raises(EnvironmentFailedError, match=says):
        trainer(tmp_path).fit(module)
    assert not (tmp_path / "agent_best.pt").exists()


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(make_module, decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay must be at least 0 and below 1"):
        make_module(ema_decay=decay)


def test_non_finite_data_stops_the_run_without_changing_weights(
    make_module, tmp_path: Path
) -> None:
    module = make_module()

    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 3:
                self.before = {n: p.clone() for n, p in pl_module.named_parameters()}
                batch["next", "reward"].fill_(float("inf"))

    run = trainer(tmp_path)
    poison = Poison()
    run.callbacks.append(poison)
    with pytest.raises(FloatingPointError, match=r"at update 3 \(environment step 4\)"):
        run.fit(module)
    assert all(torch.equal(p, poison.before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during", ["batch_start", "backward", "validation"])
def test_a_signal_ends_after_the_update_with_checkpoint_agent_and_plot(
    make_module, tmp_path: Path, during: str, number: signal.Signals
) -> None:
    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if during == "batch_start" and batch_idx == 4:
                signal.raise_signal(number)

        def on_validation_start(self, trainer, pl_module) -> None:
            if during == "validation":
                signal.raise_signal(number)

    module, run = make_module(), trainer(tmp_path, eval_every=4)
    run.callbacks.append(Interrupt())

    def interrupt(gradient: torch.Tensor) -> None:
        if during == "backward" and run.global_step == 4:
            signal.raise_signal(number)

    next(module.loss.encoder_params.parameters()).register_hook(interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        run.fit(module)
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from here on
    for name in ("agent_last.pt", "curve.png", "curve.csv"):
        assert (tmp_path / name).stat().st_size > 0, name
    content = newest_state(tmp_path)
    assert content["global_step"] == (4 if during == "validation" else 5)
    for name, value in module.loss.state_dict().items():
        assert torch.equal(content["state_dict"][f"loss.{name}"], value)


def test_a_second_ctrl_c_aborts() -> None:
    module = SimpleNamespace(experience=SimpleNamespace())
    interrupt = StopOnSignal()
    interrupt.on_train_start(None, module)
    try:
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        assert module.experience.stopping
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.teardown(None, None, "fit")


def test_learning_rates_by_group(make_module) -> None:
    rates = {"world_model": 1e-4, "reward": 2e-4, "value": 3e-4, "actor": 4e-4}
    groups = make_module(learning_rates=rates).configure_optimizers().param_groups
    assert {group["name"]: group["lr"] for group in groups} == rates
    with pytest.raises(ValueError, match="critic"):
        make_module(learning_rates={**rates, "critic": 1.0}).configure_optimizers()


def test_encoder_and_dynamics_have_separate_rates(make_module) -> None:
    rates = {"encoder": 0.0, "dynamics": 1e-3, "reward": 1e-3, "value": 1e-3, "actor": 1e-3}
    module = make_module(learning_rates=rates)
    optimizer = module.configure_optimizers()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == rates
    encoder, dynamics = (
        [p.clone() for p in getattr(module.loss, f"{name}_params").parameters()]
        for name in ("encoder", "dynamics")
    )
    update = Update(module.loss, optimizer, module.target_update)
    metrics = update(next(iter(module.experience)))
    assert "grad_norm/world_model" in metrics.keys()  # noqa: SIM118 - clipped as one group
    assert all(map(torch.equal, module.loss.encoder_params.parameters(), encoder))
    assert not any(map(torch.equal, module.loss.dynamics_params.parameters(), dynamics))


def test_another_optimizer_and_a_schedule_resume(make_module, tmp_path: Path) -> None:
    options = {
        "optimizer": partial(torch.optim.AdamW, weight_decay=0.1),
        "schedule": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    }
    for steps in (6, 12):
        start = find_checkpoint(tmp_path / "checkpoints")
        run = trainer(tmp_path, start=start, tensorboard=False)
        run.fit(make_module(steps, **options))
        (optimizer,) = run.optimizers
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 0.5**steps)


def test_an_optimizer_that_is_not_fused_is_refused(make_module) -> None:
    with pytest.raises(ValueError, match="no fused implementation"):
        make_module(optimizer=torch.optim.RMSprop).configure_optimizers()


def test_a_loss_built_on_other_networks_is_refused(make_module) -> None:
    module, other = make_module(), make_module()
    with pytest.raises(ValueError, match="does not share"):
        ALMModule(module.agent, other.loss, module.experience, module.eval_env)
    module.agent.noise.scale = module.agent.noise.scale.clone()  # as a move to a device does
    with pytest.raises(ValueError, match="does not share"):
        ALMModule(module.agent, module.loss, module.experience, module.eval_env)


def test_a_loss_built_on_the_agent_is_accepted(make_module) -> None:
    module = make_module()
    loss = ALMLoss(**module.agent.networks())
    ALMModule(module.agent, loss, module.experience, module.eval_env)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_the_error_without_wandb_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="pip install .*wandb"):
        trainer(tmp_path, wandb=True)


def test_a_run_without_a_terminal_prints_a_line_for_each_evaluation(
    make_module, tmp_path: Path, capfd
) -> None:
    trainer(tmp_path, tensorboard=True).fit(make_module())
    captured = capfd.readouterr()
    shown = captured.out + captured.err
    assert re.search(r"^step \d+/\d+: return ", shown, re.MULTILINE), shown
    assert "\r" not in shown


def test_a_video_of_the_trained_policy(make_module, tmp_path: Path) -> None:
    from PIL import Image
    from torchrl.data import Unbounded
    from torchrl.envs import TransformedEnv
    from torchrl.envs.transforms import Transform

    class Paint(Transform):
        """Frames of one gray, brighter from step to step."""

        def _call(self, next_tensordict):
            self.count = getattr(self, "count", 0) + 10
            frame = torch.full((4, 6, 3), self.count, dtype=torch.uint8)
            return next_tensordict.set("pixels", frame)

        def _reset(self, tensordict, tensordict_reset):
            return self._call(tensordict_reset)

        def transform_observation_spec(self, observation_spec):
            observation_spec["pixels"] = Unbounded((4, 6, 3), dtype=torch.uint8)
            return observation_spec

    module = make_module()
    Video(tmp_path, TransformedEnv(module.eval_env, Paint()), steps=6).on_fit_end(None, module)
    with Image.open(tmp_path / "video.gif") as video:
        assert video.n_frames == 3
        assert video.size == (6, 4)
    (tmp_path / "video.gif").unlink()
    Video(tmp_path, module.eval_env).on_fit_end(None, module)
    assert not (tmp_path / "video.gif").exists()


def test_a_video_of_stacked_pixels_shows_the_newest_frames(make_module, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image
    from torchrl.envs import CatFrames, Compose, TransformedEnv

    from alm_torchrl.envs import RenderFrames

    shades = iter(range(10, 250, 10))
    frames = RenderFrames(lambda: np.full((4, 6, 3), next(shades), np.uint8))
    module = make_module()
    stacked = Compose(frames, CatFrames(3, dim=-3, in_keys=["pixels"]))
    Video(tmp_path, TransformedEnv(module.eval_env, stacked), steps=6).on_fit_end(None, module)
    with Image.open(tmp_path / "video.gif") as video:
        assert video.size == (6, 4)
        seen = []
        for index in range(video.n_frames):
            video.seek(index)
            seen.append(video.convert("RGB").getpixel((0, 0))[0])
    assert len(seen) == 3
    assert [seen[1] - seen[0], seen[2] - seen[1]] == [20, 20]


def test_running_statistics_of_several_processes_are_refused(make_module) -> None:
    module = make_module()
    module.trainer = SimpleNamespace(world_size=2, global_rank=0)
    module.on_fit_start()
    module.agent.encoder.network.update_statistics = print
    with pytest.raises(MisconfigurationException, match=r"run\.devices=1, or .*normalize=False"):
        module.on_fit_start()

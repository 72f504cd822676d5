"""Every ablation of the objective in an update, for one seed and for several together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType

from alm_torchrl.agent import AgentConfig, ALMAgent
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    Checkpoint,
    StackedLoss,
    TargetUpdate,
    Update,
    find_checkpoint,
    make_optimizer,
    make_trainer,
)
from tests.objectives.test_ablations import SWITCHES
from tests.training.tiny import make_module

CONFIG = AgentConfig(
    {"observation": 5}, (-1.0,) * 2, (1.0,) * 2, latent_dim=4, hidden_dim=8, dynamics_hidden_dim=8
)


def make_loss(seed: int, **options: Any) -> ALMLoss:
    torch.manual_seed(seed)
    loss = ALMLoss(**ALMAgent(CONFIG).double().networks(), **options)
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    return loss


def make_windows(*shape: int) -> TensorDict:
    flag = torch.zeros(*shape, 1, dtype=torch.bool)
    observation, action, following, reward = (
        torch.randn(*shape, size, dtype=torch.float64) for size in (5, 2, 5, 1)
    )
    outcome = {"observation": following, "reward": reward, "done": flag, "terminated": flag}
    now = {"observation": observation, "action": action.tanh()}
    return TensorDict({**now, "next": outcome}, shape)


def make_update(loss: ALMLoss | StackedLoss) -> Update:
    optimizer, targets = make_optimizer(loss, 1e-2), TargetUpdate(loss, tau=0.1)
    return Update(loss, optimizer, targets, max_grad_norm=0.5)


@pytest.mark.parametrize("options", SWITCHES.values(), ids=SWITCHES)
def test_updates_of_several_seeds_are_those_of_each(monkeypatch, options: dict[str, Any]) -> None:
    rows = torch.arange(6) % 2 == 0
    monkeypatch.setattr(ALMLoss, "generated_rows", lambda self, tensordict: rows)
    batches = [make_windows(2, 6, 3) for _ in range(3)]
    apart = [make_loss(seed, **options) for seed in range(2)]
    for seed, loss in enumerate(apart):
        update = make_update(loss)
        for batch in batches:
            update(batch[seed])
    together = [make_loss(seed, **options) for seed in range(2)]
    before = [{k: v.clone() for k, v in loss.state_dict().items()} for loss in together]
    update = make_update(StackedLoss(together))
    for batch in batches:
        update(batch)
    update.check()
    for loss, one, old in zip(together, apart, before, strict=True):
        expected, found = one.state_dict(), loss.state_dict()
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8)
        assert all(not torch.equal(found[name], old[name]) for name, _ in loss.named_parameters())


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_the_multiplier_moves_towards_its_target() -> None:
    """It rises while the term is above its level, and falls while it is below."""
    loss = make_loss(0, consistency_level=2.0)
    batch = make_windows(6, 3)
    kl = loss(batch)["kl"].item()
    for target, up in ((kl / 2, True), (kl * 2, False)):
        other = make_loss(0, consistency_level=target)
        update = make_update(other)
        update(batch)
        assert (other.log_multiplier.item() > 0) == up
        assert other.log_multiplier.item() == pytest.approx(1e-2 if up else -1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_run_with_a_multiplier_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    def fit(start: Checkpoint | None = None) -> list[float]:
        module = make_module(objective={"consistency_level": 2.0}, learning_rates=1e-2)
        trainer = make_trainer(
            tmp_path,
            seed=0,
            title="",
            eval_every=6,
            checkpoint_every=6,
            start=start,
            accelerator="cpu",
            tensorboard=False,
        )
        weights: list[float] = []
        note = LambdaCallback(
            on_train_batch_end=lambda *_: weights.append(module.loss.log_multiplier.item())
        )
        trainer.callbacks.append(note)
        trainer.fit(module)
        return weights

    first = fit()
    metrics = (tmp_path / "logs/csv/metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("multiplier", "loss_multiplier", "grad_norm/multiplier"):
        assert f"train/{name}" in metrics
    shutil.rmtree(tmp_path / "checkpoints/update-0000000012")
    again = fit(find_checkpoint(tmp_path / "checkpoints"))
    assert len(first) == 12
    assert len(again) == 6
    assert abs(first[5]) > 3e-2
    assert again[0] == pytest.approx(first[6], abs=1e-3)

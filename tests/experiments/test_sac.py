"""The baselines train and write the same curve as the recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.modules import TanhNormal
from torchrl.objectives import REDQLoss

from experiments import sac


@pytest.mark.parametrize("algorithm", ["sac", "redq"])
def test_a_baseline_trains_and_writes_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    options = ["--algorithm", algorithm, "--warmup", "20", "--steps", "2", "--eval-every", "1"]
    options += ["--seed", "3", "--device", "cpu", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sac.py", *options])
    sac.main()
    rows = [line.split(",") for line in (tmp_path / "curve.csv").read_text().splitlines()]
    assert rows[0] == ["step", "seed", "return", "return_std", "frames", "seconds"]
    assert [(row[0], row[1], row[4]) for row in rows[1:]] == [("1", "3", "21"), ("2", "3", "22")]


def run_sac(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> list[list[str]]:
    fixed = ["--warmup", "20", "--eval-every", "2", "--device", "cpu", "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["sac.py", "--task", "Pendulum-v1", *fixed, *options])
    sac.main()
    return [line.split(",") for line in (folder / "curve.csv").read_text().splitlines()]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch) -> None:
    first = run_sac(monkeypatch, tmp_path, "--steps", "3", "--resume")
    updates: list[int] = []
    update = sac.PeerUpdate.__call__

    def counted(self: sac.PeerUpdate, batch: TensorDict) -> None:
        updates.append(int(self.optimizer.state_dict()["state"][0]["step"]))
        update(self, batch)

    monkeypatch.setattr(sac.PeerUpdate, "__call__", counted)
    rows = run_sac(monkeypatch, tmp_path, "--steps", "6", "--resume")
    assert rows[: len(first)] == first
    assert [row[0] for row in rows[1:]] == ["2", "4", "6"]
    assert [row[4] for row in rows[1:]] == ["22", "24", "26"]
    assert updates == [2, 3, 4, 5]
    seconds = [float(row[5]) for row in rows[1:]]
    assert seconds == sorted(seconds)
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["replay"]
    assert len(stored["action"]) == 26
    assert run_sac(monkeypatch, tmp_path, "--steps", "6", "--resume") == rows
    assert len(updates) == 4


def test_only_the_same_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    run_sac(monkeypatch, tmp_path, "--steps", "2")
    with pytest.raises(SystemExit, match="a run with other options; choose another --folder"):
        run_sac(monkeypatch, tmp_path, "--steps", "4", "--seed", "1", "--resume")
    assert len(run_sac(monkeypatch, tmp_path, "--steps", "2", "--seed", "1")) == 2


def test_long_runs_of_sac_are_compiled(tmp_path: Path, monkeypatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda loss: compiled.append(loss) or loss)
    env = sac.make_env("Pendulum-v1")
    for algorithm, steps, choice, expected in [
        ("sac", 9_999, "auto", 0),
        ("sac", 10_000, "auto", 1),
        ("redq", 10_000, "auto", 0),
        ("sac", 1, "always", 1),
        ("sac", 10_000, "never", 0),
    ]:
        options = ["--algorithm", algorithm, "--steps", str(steps), "--compile", choice]
        monkeypatch.setattr(sys, "argv", ["sac.py", *options, "--device", "cpu"])
        compiled.clear()
        sac.make_run(sac.parse_arguments(), env)
        assert len(compiled) == expected


@pytest.fixture
def redq() -> tuple[REDQLoss, TensorDict]:
    """A loss with equal critics and almost no entropy, and a batch."""
    torch.manual_seed(0)
    _, loss = sac.make_loss(REDQLoss, 3, Bounded(-1.0, 1.0, (1,)))
    loss.log_alpha.data.fill_(-30)
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        for value in params.values(True, True):
            value.data.copy_(value.data[:1].expand_as(value))
    flag = torch.zeros(8, 1, dtype=torch.bool)
    flag[0] = True
    following = {"observation": torch.randn(8, 3), "reward": torch.randn(8, 1)}
    following.update(done=flag, terminated=flag.clone())
    entries = {"observation": torch.randn(8, 3), "action": torch.rand(8, 1), "next": following}
    return loss, TensorDict(entries, [8])


def mode_and_log_prob(policy: TanhNormal, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return policy.deterministic_sample, policy.log_prob(policy.deterministic_sample)


def test_the_loss_of_the_critics_is_that_of_torchrl(redq, monkeypatch) -> None:
    loss, batch = redq
    # The actor would draw other actions in the two functions.
    monkeypatch.setattr(TanhNormal, "rsample_and_log_prob", mode_and_log_prob)
    expected = loss(batch.copy())["loss_qvalue"]
    expected.backward()
    gradients = loss.qvalue_network_params.apply(lambda p: p.grad.clone())
    loss.zero_grad()
    before = batch.clone()
    value = sac.critics_loss(loss, batch)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert_close = torch.testing.assert_close
    for key, gradient in gradients.items(True, True):
        assert_close(loss.qvalue_network_params[key].grad, gradient)
    assert all(p.grad is None or not p.grad.any() for p in loss.actor_network_params.parameters())
    assert (batch == before).all()
    assert set(batch.keys(True)) == set(before.keys(True))


def test_the_actor_moves_once_in_twenty_updates(redq) -> None:
    loss, batch = redq
    update = sac.PeerUpdate(loss, actor_every=20)
    actor = next(iter(loss.actor_network_params.parameters()))
    critic = next(iter(loss.qvalue_network_params.parameters()))
    moved = {"actor": [], "critic": []}
    for number in range(1, 41):
        before = actor.detach().clone(), critic.detach().clone()
        update(batch)
        if not torch.equal(actor, before[0]):
            moved["actor"].append(number)
        if not torch.equal(critic, before[1]):
            moved["critic"].append(number)
    assert moved == {"actor": [20, 40], "critic": list(range(1, 41))}

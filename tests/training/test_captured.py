"""Every option of the update as a CUDA graph, with a stand-in for graphs on the CPU.

The stand-in repeats the operators of an update on the same memory. It finds numbers that a graph
would freeze, tensors that are replaced instead of changed, and operators that wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch.optim import Adam

from alm_torchrl.agent import ALMAgent
from alm_torchrl.modules import NormalizedInputs, RunningNorm, TwoHot
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    ALMModule,
    CapturedUpdate,
    TargetUpdate,
    Update,
    make_optimizer,
    make_trainer,
    stack_seeds,
)
from alm_torchrl.training.seeds import losses_of
from tests.graphs import HostTensors, RecordedGraph, capture, replace_cuda_graphs
from tests.synchronization import HostReads
from tests.training.tiny import make_env

TWO_HOT = {name: {"two_hot": TwoHot(bins=11)} for name in ("reward_model", "qvalue_network")}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "continuation": {"agent": {"continuation": True}},
    "imagined": {"agent": {"continuation": True}, "imagined": True},
    "two_hot": {"agent": {"network_kwargs": TWO_HOT}},
    "multiplier": {"objective": {"consistency_level": 1.0, "consistency": "forward_kl"}},
    "classifier": {"objective": {"consistency": "classifier", "latent_target": "online"}},
    "authors": {"objective": {"bootstrap_terminated": True, "short_windows": "drop"}},
    "bound": {"objective": {"actor_objective": "bound", "loss_function": "smooth_l1"}},
    "value": {"objective": {"actor_objective": "value", "latent_target": "stop_gradient"}},
    "prioritized": {"weights": True},
    "prioritized two_hot": {
        "agent": {"continuation": True, "network_kwargs": TWO_HOT},
        "weights": True,
    },
    "normalized": {"normalized": True},
    "bfloat16": {"precision": "bf16-mixed"},
    "seeds": {"seeds": 2},
}


class Setting:
    """An update, and batches to make it on."""

    def __init__(
        self,
        *,
        agent: dict[str, Any] | None = None,
        objective: dict[str, Any] | None = None,
        weights: bool = False,
        imagined: bool = False,
        normalized: bool = False,
        precision: str = "32-true",
        seeds: int = 1,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        env = make_env()
        self.observations = env.observation_spec["observation"].shape[-1]
        self.actions = env.action_spec.shape[-1]
        options = {"latent_dim": 4, "hidden_dim": 8, "dynamics_hidden_dim": 8, **(agent or {})}
        agents = [ALMAgent.from_env(env, **options) for _ in range(seeds)]
        self.norm = RunningNorm(self.observations)
        if normalized:
            encoder = agents[0].encoder
            encoder.module[0].module = NormalizedInputs(encoder.module[0].module, [self.norm])
        agents = [agent.to(device) for agent in agents]
        self.norm.to(device)
        losses = [ALMLoss(**agent.networks(), **(objective or {})) for agent in agents]
        self.agent, self.loss = stack_seeds(agents, losses)
        self.shape = (6, 3) if seeds == 1 else (seeds, 6, 3)
        self.weights, self.imagined = weights, imagined
        # The fused optimizers do not support the meta device.
        parameters = [torch.zeros(1)]
        optimizer = make_optimizer(self.loss, 1e-3) if device == "cpu" else Adam(parameters)
        self.update = Update(
            self.loss,
            optimizer,
            TargetUpdate(self.loss, tau=0.05),
            precision=precision,
        )

    def batch(self) -> TensorDictBase:
        """Random windows with ends of episodes and padding."""
        shape = self.shape
        ended = torch.rand(*shape, 1) < 0.2
        mask = torch.ones(shape, dtype=torch.bool)
        mask[..., 0, 2:] = False
        entries = {
            "observation": torch.randn(*shape, self.observations),
            "action": torch.rand(*shape, self.actions),
            "next": {
                "observation": torch.randn(*shape, self.observations),
                "reward": torch.randn(*shape, 1),
                "done": ended,
                "terminated": ended & (torch.rand(*shape, 1) < 0.5),
            },
            "validity_mask": mask,
        }
        if self.imagined:
            entries["imagined"] = {
                "latent": torch.randn(*shape, 4),
                "action": torch.rand(*shape, self.actions),
                "value_target": torch.randn(*shape, 1),
            }
        if self.weights:
            entries["priority_weight"] = torch.rand(shape[0], 1).expand(shape).clone()
        return TensorDict(entries, batch_size=shape)


def train(setting: Setting, update: Callable[..., TensorDictBase]) -> list[torch.Tensor]:
    """Returns metrics, priorities, weights and targets of a few updates."""
    torch.manual_seed(1)
    batches = [setting.batch() for _ in range(5)]
    found = []
    for number, batch in enumerate(batches):
        for loss in losses_of(setting.loss):
            loss.consistency_coeff = 0.1 * number
        setting.norm.update(batch["observation"])
        metrics = update(batch)
        found += [value.clone() for value in metrics.values()]
        if setting.weights:
            found.append(batch["td_error"])
        setting.agent.noise.advance(20_000)
    setting.update.check()
    state = setting.loss.state_dict()
    return [*found, *(value.clone() for value in state.values() if isinstance(value, torch.Tensor))]


@pytest.mark.parametrize("case", CASES)
def test_a_captured_update_equals_the_eager_one(monkeypatch, case: str) -> None:
    replace_cuda_graphs(monkeypatch)
    eager = Setting(**CASES[case])
    wanted = train(eager, eager.update)
    setting = Setting(**CASES[case])
    captured = CapturedUpdate(setting.update, warmup=2)
    found = train(setting, captured)
    assert isinstance(captured._graph, RecordedGraph)
    assert len(captured._graph.calls) > 100
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES)
def test_no_option_reads_on_the_host(case: str) -> None:
    setting = Setting(**CASES[case])
    setting.update(setting.batch())
    batch = setting.batch()
    with HostReads() as reads:
        setting.norm.update(batch["observation"])
        setting.update(batch)
        setting.agent.noise.advance()
    assert not reads.found


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"bfloat16"}))  # meta has no autocast
def test_all_tensors_are_on_the_device_of_the_loss(monkeypatch, case: str) -> None:
    """On the meta device: a GPU would wait for a tensor of the host, or a graph would freeze it."""
    monkeypatch.setattr(torch.Tensor, "is_set_to", lambda tensor, other: tensor is other)
    setting = Setting(**CASES[case], device="meta")
    batch = setting.batch().to("meta")
    with HostTensors() as tensors:
        setting.norm.update(batch["observation"])
        metrics = setting.loss(batch)
        torch.stack([metrics[key] for key in setting.loss.out_keys]).sum().backward()
        setting.update.target_update.step()
        setting.agent.noise.advance()
    assert not tensors.found
    assert all(value.device.type == "meta" for value in metrics.values())


class CapturedModule(ALMModule):
    """A module whose update is a graph, as on a GPU."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self._update = CapturedUpdate(self._update, warmup=2)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_run_with_captured_updates_equals_an_eager_one(
    monkeypatch, tmp_path, make_module
) -> None:
    replace_cuda_graphs(monkeypatch)
    results = []
    for captured in (False, True):
        module = make_module(total_steps=12, log_every=3)
        if captured:
            module.__class__ = CapturedModule
        folder = tmp_path / str(captured)
        folder.mkdir()
        make_trainer(folder, seed=0, title="", eval_every=6, accelerator="cpu").fit(module)
        metrics = (folder / "logs" / "csv" / "metrics.csv").read_text()
        results.append((module.state_dict(), metrics))
    (wanted, wanted_metrics), (found, metrics) = results
    assert isinstance(module._update._graph, RecordedGraph)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert metrics == wanted_metrics


def test_the_stand_in_freezes_what_a_graph_would_freeze() -> None:
    class Counter:
        number = 0
        tensor = torch.zeros(())

    def step() -> torch.Tensor:
        Counter.number += 1
        return Counter.tensor + Counter.number

    graph = RecordedGraph()
    with capture(graph):
        Counter.tensor.add_(1)
        out = step()
    assert (Counter.tensor, out) == (0, 2)  # undone, but the result has its memory
    Counter.number = 10
    graph.replay()
    graph.replay()
    assert (Counter.tensor, out) == (2, 3)  # 2 + the frozen 1
    for wait in (lambda: out.item(), lambda: bool(out > 1), lambda: torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="not permitted"), capture(RecordedGraph()):
            wait()

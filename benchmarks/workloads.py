"""What is measured: whole updates of ALM, of its terms, and of TorchRL's SAC and REDQ."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchrl.data import Bounded
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import LossModule, REDQLoss, SACLoss, SoftUpdate

from alm_torchrl.agent import AgentConfig, ALMAgent
from alm_torchrl.objectives import ALMLoss


@dataclass(frozen=True)
class Task:
    """The sizes of a task and its Gymnasium id."""

    id: str
    observations: int
    actions: int


TASKS = {
    "halfcheetah": Task("HalfCheetah-v5", 17, 6),
    "humanoid": Task("Humanoid-v5", 348, 17),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes that an update's cost grows with; the paper's by default."""

    batch: int = 512
    horizon: int = 3
    hidden: int = 512
    dynamics: int = 1024


QUICKSTART = Sizes(batch=256, hidden=256, dynamics=256)


def windows(task: Task, batch: int, steps: int, device: torch.device) -> TensorDict:
    """Random windows ``[batch, steps]`` of the task's sizes in which nothing ends."""
    flag = torch.zeros(batch, steps, 1, dtype=torch.bool, device=device)

    def randn(size: int) -> Tensor:
        return torch.randn(batch, steps, size, device=device)

    outcome = {"observation": randn(task.observations), "reward": randn(1)}
    return TensorDict(
        {
            "observation": randn(task.observations),
            "action": randn(task.actions).tanh(),
            "next": {**outcome, "done": flag, "terminated": flag.clone()},
        },
        batch_size=[batch, steps],
        device=device,
    )


class Update:
    """A whole update on one batch: losses, one backward, clipping by group, Adam, targets.

    Args:
        loss: a loss module with target networks.
        batch: what it is given.
        groups: its parameters, clipped apart.
        precision: ``"32"``, or ``"bf16"`` for autocast to bfloat16.
        compiled: whether the losses are traced by ``torch.compile``.
        tau: of the moving average.
    """

    def __init__(
        self,
        loss: LossModule,
        batch: TensorDict,
        groups: list[list[nn.Parameter]],
        *,
        precision: str = "32",
        compiled: bool = False,
        tau: float = 0.005,
    ) -> None:
        self.loss, self.batch, self.groups = loss, batch, groups
        self.precision = precision
        self.optimizer = torch.optim.Adam([{"params": g} for g in groups], lr=1e-4, fused=True)
        self.targets = SoftUpdate(loss, tau=tau)
        if compiled:
            loss.compile(fullgraph=isinstance(loss, ALMLoss))

    def __call__(self) -> None:
        """One update."""
        self.backward()
        for group in self.groups:
            nn.utils.clip_grad_norm_(group, 100.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.targets.step()

    def backward(self) -> None:
        """The losses and their gradients alone."""
        with self.autocast():
            losses = self.loss(self.batch)
        sum(v for k, v in losses.items() if k.startswith("loss_")).backward()

    def autocast(self) -> AbstractContextManager[object]:
        """The precision's context."""
        if self.precision == "bf16":
            return torch.autocast(self.batch.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def flops(self) -> int:
        """Arithmetic of the matrix products of losses and gradients, counted by torch."""
        with _Arithmetic() as counter:
            self.backward()
        self.optimizer.zero_grad()
        return counter.total


class _Arithmetic(TorchDispatchMode):
    """Adds up the arithmetic of matrix products by torch's own formulas.

    Torch's ``FlopCounterMode`` also follows modules, and cannot follow a ``TensorDictParams``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def alm(task: Task, device: torch.device, sizes: Sizes | None = None, **options: Any) -> Update:
    """An update of ALM."""
    sizes = Sizes() if sizes is None else sizes
    config = AgentConfig(
        {"observation": task.observations},
        (-1.0,) * task.actions,
        (1.0,) * task.actions,
        hidden_dim=sizes.hidden,
        dynamics_hidden_dim=sizes.dynamics,
    )
    loss = ALMLoss(**ALMAgent(config).to(device).networks(), horizon=sizes.horizon)
    batch = windows(task, sizes.batch, sizes.horizon, device)
    return Update(loss, batch, list(loss.parameter_groups().values()), **options)


def alm_terms(update: Update) -> dict[str, Callable[[], None]]:
    """Each loss of an ALM update alone, with its gradients."""

    def make(name: str) -> Callable[[], None]:
        method = getattr(update.loss, name)

        def term() -> None:
            with update.autocast():
                value, _ = method(update.batch)
            value.backward()
            update.optimizer.zero_grad()

        return term

    names = ("world_model_loss", "reward_loss", "classifier_loss", "value_loss", "actor_loss")
    return {name: make(name) for name in names}


def peer(kind: type[SACLoss] | type[REDQLoss], task: Task, device: torch.device) -> Update:
    """An update of SAC or REDQ in the settings of TorchRL's recipes: widths and batch 256."""
    spec = Bounded(-1.0, 1.0, (task.actions,), device=device)

    def network(inputs: int, outputs: int) -> MLP:
        return MLP(in_features=inputs, out_features=outputs, num_cells=[256, 256], device=device)

    body = nn.Sequential(network(task.observations, 2 * task.actions), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low, "high": spec.space.high},
        default_interaction_type=InteractionType.RANDOM,
    )
    critic = ValueOperator(
        network(task.observations + task.actions, 1), in_keys=["observation", "action"]
    )
    loss = kind(actor, critic, num_qvalue_nets=10 if kind is REDQLoss else 2).to(device)
    batch = windows(task, 256, 1, device)[:, 0]
    return Update(loss, batch, [[p for p in loss.parameters() if p.requires_grad]])

"""The timed functions: updates of ALM, its losses, several seeds, SAC and REDQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchrl.data import Bounded
from torchrl.objectives import REDQLoss, SACLoss

from alm_torchrl.agent import AgentConfig, ALMAgent
from alm_torchrl.modules import PixelEncoder
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.training import (
    CapturedUpdate,
    TargetUpdate,
    Update,
    make_optimizer,
    stack_seeds,
)
from experiments.sac import PeerUpdate, make_loss


@dataclass(frozen=True)
class Task:
    """Gymnasium id and sizes of a task."""

    id: str
    observations: int
    actions: int
    pixels: int = 0
    """Height and width of three stacked frames; 0 for vectors."""

    def observe(self, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """Returns random observations ``[*shape, ...]``."""
        if self.pixels:
            size = (*shape, 9, self.pixels, self.pixels)
            return {"pixels": torch.randint(256, size, dtype=torch.uint8, device=device)}
        return {"observation": torch.randn(*shape, self.observations, device=device)}

    def encoder(self, hidden: int) -> dict[str, PixelEncoder]:
        """Returns the encoder argument of the agent; empty for the default."""
        size = self.pixels
        return {"encoder": PixelEncoder((9, size, size), hidden_dim=hidden)} if size else {}

    def options(self) -> dict[str, Any]:
        """Returns the options of :func:`~alm_torchrl.envs.make_env`."""
        return {"pixels": self.pixels} if self.pixels else {}


TASKS = {
    "halfcheetah": Task("HalfCheetah-v5", 17, 6),
    "humanoid": Task("Humanoid-v5", 348, 17),
    "pixels": Task("HalfCheetah-v5", 17, 6, pixels=84),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of batch, horizon and networks; the paper's by default."""

    batch: int = 512
    horizon: int = 3
    hidden: int = 512
    dynamics: int = 1024


QUICKSTART = Sizes(batch=256, hidden=256, dynamics=256)


def windows(task: Task, shape: tuple[int, ...], device: torch.device) -> TensorDict:
    """Returns random steps ``[*shape]`` of episodes that do not end."""
    *envs, steps = shape
    observed = task.observe((*envs, steps + 1), device)
    flag = torch.zeros(*shape, 1, dtype=torch.bool, device=device)

    def randn(size: int) -> Tensor:
        return torch.randn(*shape, size, device=device)

    outcome = {key: value.narrow(len(envs), 1, steps) for key, value in observed.items()}
    return TensorDict(
        {
            **{key: value.narrow(len(envs), 0, steps) for key, value in observed.items()},
            "action": randn(task.actions).tanh(),
            "next": {**outcome, "reward": randn(1), "done": flag, "terminated": flag.clone()},
        },
        batch_size=shape,
        device=device,
    )


class ALMWork:
    """An update of ALM on one batch, as in training but without sampling.

    Args:
        task: task with its sizes.
        device: device of the update.
        sizes: sizes of networks and batch; the paper's by default.
        seeds: number of seeds trained together.
        precision: precision of the losses.
        compiled: whether the losses are compiled.
        captured: whether the update is a CUDA graph.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        sizes: Sizes | None = None,
        *,
        seeds: int = 1,
        precision: str = "32-true",
        compiled: bool = False,
        captured: bool = False,
    ) -> None:
        sizes = Sizes() if sizes is None else sizes
        config = AgentConfig(
            {} if task.pixels else {"observation": task.observations},
            (-1.0,) * task.actions,
            (1.0,) * task.actions,
            hidden_dim=sizes.hidden,
            dynamics_hidden_dim=sizes.dynamics,
        )
        agents = [ALMAgent(config, **task.encoder(sizes.hidden)).to(device) for _ in range(seeds)]
        losses = [ALMLoss(**agent.networks(), horizon=sizes.horizon) for agent in agents]
        self.agent, self.loss = stack_seeds(agents, losses)
        shape = (sizes.batch, sizes.horizon)
        self.batch = windows(task, shape if seeds == 1 else (seeds, *shape), device)
        update = Update(
            self.loss,
            make_optimizer(self.loss),
            TargetUpdate(self.loss, tau=0.005),
            precision=precision,
            compiled=compiled,
        )
        self.update = CapturedUpdate(update) if captured else update

    def __call__(self) -> None:
        """Runs one update."""
        self.update(self.batch)

    def terms(self) -> dict[str, Callable[[], None]]:
        """Returns a function for each loss with its gradients."""

        def make(name: str) -> Callable[[], None]:
            def term() -> None:
                value, _ = getattr(self.loss, name)(self.batch)
                value.backward()
                self.loss.zero_grad()

            return term

        names = ("world_model_loss", "reward_loss", "classifier_loss", "value_loss", "actor_loss")
        return {name: make(name) for name in names}

    def all_terms(self) -> None:
        """Computes all losses and their gradients."""
        losses = self.loss(self.batch)
        torch.stack([losses[key] for key in self.loss.out_keys]).sum().backward()
        self.loss.zero_grad()


class Arithmetic(TorchDispatchMode):
    """Counts the floating point operations of matrix products by torch's formulas.

    Torch's ``FlopCounterMode`` fails on modules with ``TensorDictParams``.
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


def flops(work: Callable[[], object]) -> int:
    """Returns the floating point operations of the matrix products of one call."""
    with Arithmetic() as counter:
        work()
    return counter.total


class PeerWork:
    """An update of TorchRL's SAC or REDQ with the settings of its recipes: widths and batch 256.

    Args:
        kind: class of the loss.
        task: task with its sizes.
        device: device of the update.
        **options: options of :class:`~experiments.sac.PeerUpdate`.
    """

    def __init__(
        self,
        kind: type[SACLoss] | type[REDQLoss],
        task: Task,
        device: torch.device,
        **options: Any,
    ) -> None:
        spec = Bounded(-1.0, 1.0, (task.actions,), device=device)
        self.actor, loss = make_loss(kind, task.observations, spec, device)
        self.batch = windows(task, (256,), device)
        self.update = PeerUpdate(loss, **options)

    def __call__(self) -> None:
        """Runs one update."""
        self.update(self.batch)


def stable_baselines_sac(task: Task, device: torch.device) -> Callable[[], None] | None:
    """Returns an update of Stable-Baselines3's SAC, or None if it is not installed."""
    if find_spec("stable_baselines3") is None:
        return None
    import gymnasium
    import numpy as np
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    class Spaces(gymnasium.Env):
        """An environment with spaces but without steps."""

        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (task.observations,), np.float32)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (task.actions,), np.float32)

    model = SAC("MlpPolicy", Spaces(), buffer_size=1000, device=device)
    model.set_logger(Logger(folder=None, output_formats=[]))
    buffer: Any = model.replay_buffer
    rng = np.random.default_rng(0)

    def rows(size: int) -> Any:
        return rng.standard_normal((1, size)).astype(np.float32)

    for _ in range(1000):
        action = np.tanh(rows(task.actions))
        state, following = rows(task.observations), rows(task.observations)
        buffer.add(state, following, action, rows(1)[0], np.zeros(1), [{}])
    return lambda: model.train(gradient_steps=1, batch_size=256)

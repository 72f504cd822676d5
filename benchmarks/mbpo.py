"""A step of MBPO (Janner et al., NeurIPS 2019), which TorchRL does not have, from torch's parts.

Every 250 environment steps, an ensemble learns the dynamics from the whole replay buffer, and
imagines 100,000 transitions. TorchRL's SAC then learns from imagined and real transitions, with 20
to 40 updates per environment step. Numbers and rules are those of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import ProbabilisticActor

from alm_torchrl.data import make_collector
from alm_torchrl.envs import make_env
from benchmarks.workloads import TASKS, Task


@dataclass(frozen=True)
class MBPOSizes:
    """Sizes and counts of MBPO; the published ones for HalfCheetah by default.

    Attributes:
        members: number of networks in the ensemble.
        elites: number of networks with the smallest holdout loss, which imagine transitions.
        width: units of each of the four hidden layers.
        batch: transitions of an update of the ensemble, drawn separately for each network.
        every: environment steps between two trainings of the ensemble.
        starts: imagined transitions after each training. The published rollouts have one step on
            HalfCheetah and Walker2d, and during the first 20,000 steps on all tasks.
        updates: updates of SAC per environment step.
        patience: the training stops after more epochs than this without improvement.
    """

    members: int = 7
    elites: int = 5
    width: int = 200
    batch: int = 256
    every: int = 250
    starts: int = 100_000
    updates: int = 40
    patience: int = 5


#: The published settings by task. Walker2d, Hopper and Ant have the first with 20 updates.
MBPO_SIZES = {
    "halfcheetah": MBPOSizes(),
    "humanoid": MBPOSizes(width=400, every=1000, updates=20),
}
#: Weight decay of the weights of the five layers.
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
#: Transitions that are held out of the training: this share, but not more than this number.
HOLDOUT, MAX_HOLDOUT = 0.2, 5000
#: Relative decrease of a network's holdout loss that counts as improvement.
IMPROVEMENT = 0.01


class BatchedLinear(nn.Module):
    """Linear layers of all networks of an ensemble in one batched product."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        std = 0.5 / math.sqrt(inputs)
        weight = torch.empty(members, inputs, outputs)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, 0, std, -2 * std, 2 * std))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, rows: Tensor, members: Tensor | None = None) -> Tensor:
        """Maps rows ``[members, rows, inputs]``, by all networks or by the given ones."""
        if members is None:
            return torch.baddbmm(self.bias, rows, self.weight)
        return torch.baddbmm(self.bias[members], rows, self.weight[members])


class DynamicsEnsemble(nn.Module):
    """Networks that predict reward and change of the observation as normal distributions."""

    mean: Tensor
    std: Tensor
    elites: Tensor

    def __init__(self, observations: int, actions: int, sizes: MBPOSizes) -> None:
        super().__init__()
        self.members, outputs = sizes.members, 1 + observations
        widths = (observations + actions, *4 * (sizes.width,), 2 * outputs)
        pairs = pairwise(widths)
        self.layers = nn.ModuleList(BatchedLinear(sizes.members, *pair) for pair in pairs)
        self.max_log_var = nn.Parameter(torch.full((outputs,), 0.5))
        self.min_log_var = nn.Parameter(torch.full((outputs,), -10.0))
        self.register_buffer("mean", torch.zeros(widths[0]))
        self.register_buffer("std", torch.ones(widths[0]))
        self.register_buffer("elites", torch.arange(sizes.elites))

    def forward(self, inputs: Tensor, members: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns means and logarithms of the variances, both ``[members, rows, outputs]``."""
        hidden = (inputs - self.mean) / self.std
        for layer in self.layers[:-1]:
            hidden = F.silu(layer(hidden, members))
        loc, log_var = self.layers[-1](hidden, members).chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return loc, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the sum of the networks' negative log-likelihoods, and of the bounds."""
        loc, log_var = self(inputs)
        likelihoods = ((loc - targets).square() * (-log_var).exp() + log_var).mean((1, 2))
        return likelihoods.sum() + 0.01 * (self.max_log_var.sum() - self.min_log_var.sum())

    @torch.no_grad()
    def errors(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean squared error ``[members]`` of the networks on the same rows."""
        loc, _ = self(inputs.expand(self.members, -1, -1))
        return (loc - targets).square().mean((1, 2))

    @torch.no_grad()
    def step(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Samples next observations and rewards; each elite predicts an equal share of the rows.

        The authors' code evaluates all networks on all rows, and then draws one of them per row.
        """
        rows = torch.cat([observation, action], -1)
        loc, log_var = self(rows.unflatten(0, (len(self.elites), -1)), self.elites)
        sample = (loc + torch.randn_like(loc) * (0.5 * log_var).exp()).flatten(0, 1)
        return observation + sample[:, 1:], sample[:, :1]


class DynamicsTraining:
    """Trains an ensemble on a growing replay buffer.

    Args:
        ensemble: the ensemble; it keeps its weights from one training to the next.
        sizes: sizes and counts of MBPO.
    """

    def __init__(self, ensemble: DynamicsEnsemble, sizes: MBPOSizes) -> None:
        self.ensemble, self.sizes = ensemble, sizes
        weights = [layer.weight for layer in ensemble.layers]
        groups: list[dict[str, Any]] = [
            {"params": [weight], "weight_decay": decay}
            for weight, decay in zip(weights, WEIGHT_DECAY, strict=True)
        ]
        rest = [layer.bias for layer in ensemble.layers]
        groups.append({"params": [*rest, ensemble.max_log_var, ensemble.min_log_var]})
        self.optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)

    def epoch(self, inputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """Runs one epoch over the rows ``[members, rows]``, and returns them shuffled."""
        for batch in rows.split(self.sizes.batch, dim=1):
            self.ensemble.loss(inputs[batch], targets[batch]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return rows.gather(1, torch.rand(rows.shape, device=rows.device).argsort(1))

    def __call__(self, inputs: Tensor, targets: Tensor) -> int:
        """Trains until the holdout losses stop improving, and chooses the elites.

        Args:
            inputs: observations and actions ``[transitions, ...]``.
            targets: rewards and changes of the observation ``[transitions, ...]``.

        Returns:
            The number of epochs.
        """
        kept, held = split(inputs, targets)
        inputs, targets = kept
        std = inputs.std(0)
        self.ensemble.mean, self.ensemble.std = inputs.mean(0), std.where(std > 1e-12, 1.0)
        rows = torch.randint(len(inputs), (self.sizes.members, len(inputs)), device=inputs.device)
        parameters = [p for layer in self.ensemble.layers for p in layer.parameters()]
        saved = [p.detach().clone() for p in parameters]
        best = torch.full((self.sizes.members,), math.inf, device=inputs.device)
        epochs = waited = 0
        while waited <= self.sizes.patience:
            rows = self.epoch(inputs, targets, rows)
            errors = self.ensemble.errors(*held)
            improved = errors < (1 - IMPROVEMENT) * best
            best = torch.where(improved, errors, best)
            for kept_weight, weight in zip(saved, parameters, strict=True):
                kept_weight[improved] = weight.detach()[improved]
            epochs += 1
            waited = 0 if improved.any() else waited + 1
        with torch.no_grad():
            for kept_weight, weight in zip(saved, parameters, strict=True):
                weight.copy_(kept_weight)
        self.ensemble.elites = self.ensemble.errors(*held).argsort()[: self.sizes.elites]
        return epochs


Pair = tuple[Tensor, Tensor]


def split(inputs: Tensor, targets: Tensor) -> tuple[Pair, Pair]:
    """Splits transitions into those for training and those held out, at random."""
    count = min(int(HOLDOUT * len(inputs)), MAX_HOLDOUT)
    order = torch.randperm(len(inputs), device=inputs.device)
    held, kept = order[:count], order[count:]
    return (inputs[kept], targets[kept]), (inputs[held], targets[held])


def regression_data(transitions: TensorDict) -> Pair:
    """Returns inputs and targets of the ensemble for transitions ``[transitions]``."""
    observation, following = transitions["observation"], transitions["next"]
    inputs = torch.cat([observation, transitions["action"]], -1)
    change = following["observation"] - observation
    return inputs.float(), torch.cat([following["reward"], change], -1).float()


class MBPOWork:
    """The parts of MBPO's step that are not updates of SAC, on random transitions.

    Args:
        actor: actor of SAC, which acts in the imagined transitions.
        transitions: the content of the replay buffer ``[transitions]``.
        sizes: sizes and counts of MBPO.
    """

    def __init__(
        self, actor: ProbabilisticActor, transitions: TensorDict, sizes: MBPOSizes
    ) -> None:
        self.actor, self.sizes = actor, sizes
        self.observations = transitions["observation"]
        observations, actions = (transitions[key].shape[-1] for key in ("observation", "action"))
        ensemble = DynamicsEnsemble(observations, actions, sizes).to(transitions.device)
        self.training = DynamicsTraining(ensemble, sizes)
        self.data = regression_data(transitions)
        storage = LazyTensorStorage(4 * sizes.starts, device=transitions.device)
        self.imagined = TensorDictReplayBuffer(storage=storage, batch_size=sizes.batch)

    def epoch(self, transitions: int) -> Callable[[], None]:
        """Returns a function that runs one epoch with so many transitions, and its holdout loss."""
        (inputs, targets), held = split(*(part[:transitions] for part in self.data))
        shape = (self.sizes.members, len(inputs))
        rows = torch.randint(len(inputs), shape, device=inputs.device)

        def work() -> None:
            self.training.epoch(inputs, targets, rows)
            self.training.ensemble.errors(*held)

        return work

    @torch.no_grad()
    def imagine(self) -> None:
        """Imagines a step from real observations and stores it."""
        count = (self.sizes.starts,)
        rows = torch.randint(len(self.observations), count, device=self.observations.device)
        td = self.actor(TensorDict({"observation": self.observations[rows]}, count))
        following, reward = self.training.ensemble.step(td["observation"], td["action"])
        never = torch.zeros_like(reward, dtype=torch.bool)
        entries = {"observation": following, "reward": reward, "done": never, "terminated": never}
        imagined = td.select("observation", "action").set("next", TensorDict(entries, count))
        self.imagined.extend(imagined)


def count_epochs(
    task: str, transitions: tuple[int, ...], sizes: MBPOSizes, trainings: int = 3
) -> tuple[str, dict[str, Any]]:
    """Counts the epochs of MBPO's model on transitions of random actions.

    For each size of the replay buffer, a new ensemble is trained once; then it is trained again
    after every ``sizes.every`` further steps, as during a run.

    Args:
        task: name in ``TASKS``.
        transitions: sizes of the replay buffer at the first training.
        sizes: sizes and counts of MBPO.
        trainings: number of further trainings.

    Returns:
        A line to print, and a record.
    """
    inputs, targets = random_data(TASKS[task], max(transitions) + trainings * sizes.every)
    counts: dict[str, dict[str, Any]] = {}
    for start in transitions:
        actions = TASKS[task].actions
        ensemble = DynamicsEnsemble(inputs.shape[-1] - actions, actions, sizes)
        train = DynamicsTraining(ensemble, sizes)
        ends = [start + index * sizes.every for index in range(trainings + 1)]
        first, *further = (train(inputs[:end], targets[:end]) for end in ends)
        counts[str(start)] = {"first": first, "further": further}
    line = "; ".join(
        f"{start} transitions: {count['first']} epochs of a new ensemble, then "
        f"{', '.join(map(str, count['further']))} every {sizes.every} steps"
        for start, count in counts.items()
    )
    return line, {"epochs": counts}


def random_data(task: Task, transitions: int) -> Pair:
    """Collects transitions with random actions, as inputs and targets of the ensemble."""
    env = make_env(task.id, seed=0)
    collector = make_collector(
        env, None, frames_per_batch=transitions, total_frames=transitions, seed=0
    )
    data = next(iter(collector))
    collector.shutdown()
    return regression_data(data)

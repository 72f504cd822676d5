"""TorchRL's SAC and REDQ as baselines: ``python experiments/sac.py --task HalfCheetah-v5``.

Environments, collector and evaluation are those of recipes/mujoco.py, and ``curve.csv`` has the
same columns, so that only the algorithm differs. With ``--resume``, an interrupted run continues
from its last evaluation.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import REDQLoss, SACLoss, SoftUpdate
from torchrl.objectives.utils import distance_loss

from alm_torchrl.data import make_collector
from alm_torchrl.envs import make_env
from alm_torchrl.evaluation import evaluate_policy

#: Loss and published number of updates per environment step.
ALGORITHMS = {"sac": (SACLoss, 1), "redq": (REDQLoss, 20)}
FIELDS = ("step", "seed", "return", "return_std", "frames", "seconds")


def make_loss(
    kind: type[SACLoss] | type[REDQLoss],
    observations: int,
    spec: Bounded,
    device: torch.device | str = "cpu",
) -> tuple[ProbabilisticActor, SACLoss | REDQLoss]:
    """Builds actor and loss with the settings of TorchRL's recipes: two layers of 256 units.

    Args:
        kind: class of the loss; REDQ has ten critics.
        observations: size of the observation.
        spec: spec of the action.
        device: device of the parameters.
    """
    actions = spec.shape[-1]

    def network(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, outputs, num_cells=[256, 256], device=device)

    body = nn.Sequential(network(observations, 2 * actions), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low, "high": spec.space.high},
        default_interaction_type=InteractionType.RANDOM,
    )
    critic = ValueOperator(network(observations + actions, 1), in_keys=["observation", "action"])
    loss = kind(actor, critic, num_qvalue_nets=10 if kind is REDQLoss else 2).to(device)
    loss.make_value_estimator(gamma=0.99)
    return actor, loss


class PeerUpdate:
    """An update of TorchRL's SAC or REDQ with the settings of TorchRL's recipes.

    Args:
        loss: the loss, from :func:`make_loss`.
        compiled: whether the loss is compiled.
        actor_every: number of updates of REDQ's critics for each update of its actor. TorchRL's
            loss updates both together; the publication updates the actor once in twenty updates.
    """

    def __init__(
        self, loss: SACLoss | REDQLoss, *, compiled: bool = False, actor_every: int = 1
    ) -> None:
        self.loss, self.actor_every, self.count = loss, actor_every, 0
        self.losses = torch.compile(loss) if compiled else loss
        parameters = [p for p in loss.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=3e-4, fused=True)
        self.targets = SoftUpdate(loss, tau=0.005)

    def __call__(self, batch: TensorDict) -> None:
        """Updates networks and targets with a batch ``[batch]``."""
        self.count += 1
        if self.count % self.actor_every:
            critics_loss(self.loss, batch).backward()
        else:
            losses = self.losses(batch)
            sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.targets.step()


def critics_loss(loss: REDQLoss, batch: TensorDict) -> Tensor:
    """Returns ``loss_qvalue`` of REDQ alone; ``REDQLoss.forward`` always computes all losses."""
    following = batch["next"].select(*loss.actor_network.in_keys)
    with torch.no_grad():
        with loss.actor_network_params.to_module(loss.actor_network):
            policy = loss.actor_network.get_dist(following)
        following["action"], log_prob = policy.rsample_and_log_prob()
        chosen = torch.randperm(loss.num_qvalue_nets, device=batch.device)[: loss.sub_sample_len]
        values = _values(loss, following, loss.target_qvalue_network_params[chosen])
        value = values.min(0)[0] - loss.alpha * log_prob
        filled = batch.copy().set(("next", "state_value"), value.unsqueeze(-1))
        target = loss.value_estimator.value_estimate(filled).squeeze(-1)
    predicted = _values(loss, batch, loss.qvalue_network_params)
    return distance_loss(predicted, target.expand_as(predicted), loss.loss_function).mean()


def _values(loss: REDQLoss, batch: TensorDict, params: TensorDict) -> Tensor:
    """Returns values ``[critics, batch]``."""
    batch = batch.select(*loss.qvalue_network.in_keys)
    batch = batch.expand(params.shape[0], *batch.batch_size)
    return loss._vmap_qvalue_network00(batch, params)["state_action_value"].squeeze(-1)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="sac")
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=20_000, help="environment steps after the warm-up"
    )
    parser.add_argument("--warmup", type=int, default=5_000, help="random steps at the start")
    parser.add_argument("--eval-every", type=int, default=1_000)
    parser.add_argument(
        "--compile",
        choices=("auto", "always", "never"),
        default="auto",
        help="compile the loss; auto: from 10,000 updates of SAC",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/sac"))
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


@dataclass
class Run:
    """What a run consists of, apart from the environment.

    Attributes:
        settings: options that a resumed run shares with the interrupted one.
        update: loss, optimizer and target networks.
        replay: replay buffer.
        rows: rows of the curve.
        frames: environment steps, including the warm-up.
        seconds: duration of the interrupted run.
    """

    settings: dict[str, object]
    update: PeerUpdate
    replay: TensorDictReplayBuffer
    rows: list[tuple[float, ...]] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        """Writes ``curve.csv`` and ``checkpoint.pt``, which is complete even after a crash."""
        with (folder / "curve.csv").open("w", newline="") as file:
            csv.writer(file).writerows([FIELDS, *self.rows])
        content = {
            "settings": self.settings,
            "loss": self.update.loss.state_dict(),
            "optimizer": self.update.optimizer.state_dict(),
            "replay": self.replay[:].to_dict(),
            "rows": self.rows,
            "frames": self.frames,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        torch.save(content, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")

    def load(self, folder: Path) -> None:
        """Continues from the checkpoint in the folder, if any."""
        if not (folder / "checkpoint.pt").is_file():
            return
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        if content["settings"] != self.settings:
            raise SystemExit(f"{folder} has a run with other options; choose another --folder")
        self.update.loss.load_state_dict(content["loss"])
        self.update.optimizer.load_state_dict(content["optimizer"])
        self.replay.extend(TensorDict(content["replay"], [len(content["replay"]["action"])]))
        self.rows, self.frames = content["rows"], content["frames"]
        self.seconds = content["seconds"]
        torch.set_rng_state(content["random"])


def make_run(args: argparse.Namespace, env: EnvBase) -> tuple[ProbabilisticActor, Run]:
    """Builds the actor and the run."""
    kind, updates = ALGORITHMS[args.algorithm]
    size = env.observation_spec["observation"].shape[-1]
    actor, loss = make_loss(kind, size, env.action_spec, args.device)
    many = kind is SACLoss and args.steps * updates >= 10_000
    compiled = args.compile == "always" or (args.compile == "auto" and many)
    storage = LazyTensorStorage(1_000_000, device=args.device)
    replay = TensorDictReplayBuffer(storage=storage, batch_size=256)
    shared = ("algorithm", "task", "seed", "warmup", "eval_every")
    settings = {name: getattr(args, name) for name in shared}
    return actor, Run(settings, PeerUpdate(loss, compiled=compiled), replay)


def main() -> None:
    """Trains and evaluates the baseline."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    env = make_env(args.task, seed=args.seed)
    eval_env = make_env(args.task, seed=args.seed + 1000, num_envs=5)
    actor, run = make_run(args, env)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.resume:
        run.load(args.folder)
    last = args.steps + args.warmup
    if run.frames >= last:
        return
    collector = make_collector(
        env,
        actor,
        init_random_frames=max(0, args.warmup - run.frames),
        total_frames=last - run.frames,
        policy_device=args.device,
    )
    start = time.monotonic() - run.seconds
    for data in collector:
        run.replay.extend(data)
        run.frames += 1
        step = run.frames - args.warmup
        if step < 1:
            continue
        for _ in range(ALGORITHMS[args.algorithm][1]):
            run.update(run.replay.sample())
        if step % args.eval_every == 0:
            returns = evaluate_policy(eval_env, actor, episodes=5)
            mean, std = (float(f"{v.item():.7g}") for v in (returns.mean(), returns.std(0, False)))
            run.seconds = time.monotonic() - start
            run.rows.append((step, args.seed, mean, std, run.frames, round(run.seconds, 1)))
            run.save(args.folder)
            print(f"step {step}: return {mean:.0f} +- {std:.0f}", flush=True)


if __name__ == "__main__":
    main()

"""TorchRL's SAC and REDQ as baselines: ``python experiments/sac.py --task HalfCheetah-v5``.

Environments, collector and evaluation are those of recipes/mujoco.py, and ``curve.csv`` has the
same columns, so that only the algorithm differs.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from tensordict.nn import InteractionType, TensorDictModule
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import REDQLoss, SACLoss, SoftUpdate

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
    parser.add_argument("--folder", type=Path, default=Path("runs/sac"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Trains and evaluates the baseline."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    env = make_env(args.task, seed=args.seed)
    eval_env = make_env(args.task, seed=args.seed + 1000, num_envs=5)
    kind, updates = ALGORITHMS[args.algorithm]
    size = env.observation_spec["observation"].shape[-1]
    actor, loss = make_loss(kind, size, env.action_spec, args.device)
    parameters = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-4, fused=True)
    target_update = SoftUpdate(loss, tau=0.005)
    storage = LazyTensorStorage(1_000_000, device=args.device)
    replay = TensorDictReplayBuffer(storage=storage, batch_size=256)
    collector = make_collector(
        env, actor, init_random_frames=args.warmup, policy_device=args.device
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (args.folder / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for frame, data in enumerate(collector, start=1):
            replay.extend(data)
            step = frame - args.warmup
            if step < 1:
                continue
            for _ in range(updates):
                losses = loss(replay.sample())
                sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
                optimizer.step()
                optimizer.zero_grad()
                target_update.step()
            if step % args.eval_every == 0:
                returns = evaluate_policy(eval_env, actor, episodes=5)
                mean, std = (
                    float(f"{v.item():.7g}") for v in (returns.mean(), returns.std(0, False))
                )
                seconds = round(time.monotonic() - start, 1)
                writer.writerow((step, args.seed, mean, std, frame, seconds))
                file.flush()
                print(f"step {step}: return {mean:.0f} +- {std:.0f}")
            if step == args.steps:
                return


if __name__ == "__main__":
    main()

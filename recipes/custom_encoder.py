"""Trains ALM with a custom encoder: ``python recipes/custom_encoder.py [--task ...]``.

The network is an MLP with a skip connection; replace it by any torch module. The encoder is checked
before training. To use it with recipes/mujoco.py:

    python recipes/mujoco.py encoder.build._target_=recipes.custom_encoder.make_encoder
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torchrl.data import Composite
from torchrl.objectives import SoftUpdate

from alm_torchrl import ALMAgent, ALMLoss, make_collector, make_env, make_replay_buffer
from alm_torchrl.evaluation import evaluate_policy
from alm_torchrl.modules import LatentModule


class Skip(nn.Module):
    """Maps an observation ``[..., O]`` to location and raw scale ``[..., 2 * latent_dim]``."""

    def __init__(self, observation_dim: int, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(observation_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.SiLU()
        )
        self.outer = nn.Linear(hidden_dim + observation_dim, 2 * latent_dim)

    def forward(self, observation: Tensor) -> Tensor:
        """Accepts any leading dimensions."""
        return self.outer(torch.cat([self.inner(observation), observation], dim=-1))


def make_encoder(
    observation_spec: Composite, latent_dim: int = 50, hidden_dim: int = 256
) -> LatentModule:
    """Builds the encoder for the vector ``"observation"``."""
    observation_dim = observation_spec["observation"].shape[-1]
    return LatentModule(Skip(observation_dim, latent_dim, hidden_dim), in_keys=["observation"])


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6_000, help="steps after the warm-up")
    parser.add_argument("--warmup", type=int, default=2_000, help="random steps at the start")
    parser.add_argument("--eval-every", type=int, default=1_000)
    return parser.parse_args()


def main() -> None:
    """Builds environment, encoder, agent, loss and data, and trains."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    env = make_env(args.task, seed=args.seed)
    eval_env = make_env(args.task, seed=args.seed + 1000, num_envs=5)

    encoder = make_encoder(env.observation_spec_unbatched)
    # Takes the sizes of the other networks from the encoder, and checks it.
    agent = ALMAgent.from_env(
        env, encoder=encoder, hidden_dim=256, dynamics_hidden_dim=256, noise_steps=6_000
    )
    loss = ALMLoss(**agent.networks(), horizon=3)
    groups = loss.parameter_groups()
    optimizer = torch.optim.Adam([{"params": group} for group in groups.values()], lr=1e-3)
    target_update = SoftUpdate(loss, tau=0.01)

    replay = make_replay_buffer(100_000, batch_size=256, window_length=3)
    collector = make_collector(env, agent.policy(), init_random_frames=args.warmup)
    for frame, data in enumerate(collector, start=1):
        replay.extend(data)
        agent.update_statistics(data)  # used by encoders with normalize=True
        step = frame - args.warmup
        if step < 1:
            continue
        losses = loss(replay.sample())
        sum(losses[key] for key in loss.out_keys).backward()
        for group in groups.values():
            torch.nn.utils.clip_grad_norm_(group, 100.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        target_update.step()
        agent.noise.advance()
        if step % args.eval_every == 0:
            returns = evaluate_policy(eval_env, agent.policy(), episodes=5)
            print(f"step {step}: return {returns.mean():.0f} +- {returns.std():.0f}")
            agent.save("agent.pt")  # ALMAgent.load("agent.pt", encoder=make_encoder(spec))
        if step == args.steps:
            break


if __name__ == "__main__":
    main()

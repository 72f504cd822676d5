"""Trains ALM in a plain TorchRL loop: ``python recipes/custom_loop.py [--task ...]``.

The agent is that of ``python recipes/mujoco.py``; it is saved as ``agent.pt``. Copy this file to
write your own loop.
"""

from __future__ import annotations

import argparse
import sys

sys.path.pop(0)  # in this folder, mujoco.py would shadow the package mujoco

import torch
from torchrl.objectives import SoftUpdate

from alm_torchrl import ALMAgent, ALMLoss, make_collector, make_env, make_replay_buffer
from alm_torchrl.evaluation import evaluate_policy


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6_000, help="steps after the warm-up")
    parser.add_argument("--warmup", type=int, default=2_000, help="random steps at the start")
    parser.add_argument("--eval-every", type=int, default=1_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Builds environment, agent, loss and data, and trains."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    env = make_env(args.task, seed=args.seed)
    eval_env = make_env(args.task, seed=args.seed + 1000, num_envs=5)

    sizes = {"hidden_dim": 256, "dynamics_hidden_dim": 256, "noise_steps": 6_000}
    agent = ALMAgent.from_env(env, **sizes).to(args.device)
    policy = agent.policy()

    loss = ALMLoss(**agent.networks(), horizon=3)
    groups = loss.parameter_groups()
    optimizer = torch.optim.Adam([{"params": group} for group in groups.values()], lr=1e-3)
    target_update = SoftUpdate(loss, tau=0.01)

    replay = make_replay_buffer(100_000, batch_size=256, window_length=3, device=args.device)
    collector = make_collector(
        env, policy, init_random_frames=args.warmup, policy_device=args.device
    )

    for frame, data in enumerate(collector, start=1):
        replay.extend(data)
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
            returns = evaluate_policy(eval_env, policy, episodes=5)
            print(f"step {step}: return {returns.mean():.0f} +- {returns.std():.0f}")
            agent.save("agent.pt")
        if step == args.steps:
            break


if __name__ == "__main__":
    main()

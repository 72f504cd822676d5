"""Plays a trained agent: ``python recipes/enjoy.py RUN [--episodes 10] [--video out.gif]``.

RUN is a run's folder, an agent's file, a name under pretrained/, or OWNER/NAME on the hub. Prints
mean and standard deviation of the returns.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder, mujoco.py would shadow the package mujoco
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.script import prepare_script

prepare_script("gymnasium", "hydra", "lightning", "mujoco")

import torch
from tensordict.nn import TensorDictModuleBase

from alm_torchrl.envs import make_env
from alm_torchrl.envs.video import write_video
from alm_torchrl.evaluation import evaluate_policy
from recipes.trained import Trained, add_arguments, find, main

FRAMES_PER_SECOND = 25  # at most, of a video
PARALLEL = 10  # episodes played together


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--latent", choices=("sample", "mean"), default="sample",
        help="act on a sample of the latent, as in training, or on its mean",
    )  # fmt: skip
    parser.add_argument("--video", type=Path, help="record a video: out.gif or out.mp4")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the video")
    parser.add_argument("--width", type=int, default=320, help="largest width and height in pixels")
    args = parser.parse_args()
    for name in ("episodes", "seconds", "width"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be positive")
    if args.video is not None and args.video.suffix not in (".gif", ".mp4"):
        parser.error(f"--video must end in .gif or .mp4, not {args.video.name!r}")
    if args.video is not None and args.video.suffix == ".mp4" and not find_spec("imageio_ffmpeg"):
        parser.error("mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or choose a .gif")
    return args


def play() -> None:
    """Loads the agent, prints its returns and records the video."""
    args = parse_arguments()
    trained = find(args.agent, args.task)
    policy = trained.agent.policy(latent=args.latent)
    found = evaluate(trained, policy, args.episodes, args.seed)
    task, known = trained.environment["task"], trained.evaluation
    result = "return {mean:.1f} +- {std:.1f} over {episodes} episodes".format(**found)
    print(f"{task}: {result}; {trained.path}")
    if known.keys() >= {"mean", "std", "episodes"}:
        print("model card: return {mean:.1f} +- {std:.1f} over {episodes} episodes".format(**known))
    if args.video is not None:
        torch.manual_seed(args.seed)
        record(trained.environment, policy, args)


def evaluate(
    trained: Trained, policy: TensorDictModuleBase, episodes: int, seed: int
) -> dict[str, Any]:
    """Returns mean and standard deviation of the returns of episodes, and how they were played."""
    torch.manual_seed(seed)
    env = make_env(**trained.environment, num_envs=min(episodes, PARALLEL), seed=seed)
    returns = evaluate_policy(env, policy, episodes)
    env.close()
    mean, std = returns.mean().item(), returns.std(correction=0).item()
    return {"mean": mean, "std": std, "episodes": episodes, "seed": seed}


def record(
    environment: dict[str, Any], policy: TensorDictModuleBase, args: argparse.Namespace
) -> None:
    """Records the start of an episode, or warns if the task cannot be rendered."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            env = make_env(**environment, from_pixels=True, seed=args.seed)
            reason = "" if "pixels" in env.observation_spec else str(caught[-1].message)
        except ValueError as error:  # an environment without a renderer
            reason = str(error)
    if reason:
        print(f"warning: no video: {reason}", file=sys.stderr)
        return
    rate = (getattr(env, "metadata", None) or {}).get("render_fps", FRAMES_PER_SECOND)
    rate /= environment.get("action_repeat", 1)
    every = max(1, round(rate / FRAMES_PER_SECOND))
    with torch.no_grad():
        rollout = env.rollout(max(1, round(args.seconds * rate)), policy)
    pixels = rollout["pixels"][::every]
    write_video(pixels, args.video, rate / every, args.width)
    print(f"{len(pixels)} frames: {args.video}")


if __name__ == "__main__":
    main(play)

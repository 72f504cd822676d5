"""Plays a trained agent: ``python recipes/enjoy.py RUN [--episodes 10] [--video out.gif]``.

RUN is a run's folder, an agent's file, a name under pretrained/, or OWNER/NAME on the hub. Prints
mean and standard deviation of the returns.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder, mujoco.py would shadow the package mujoco
    sys.path[0] = str(Path(__file__).resolve().parents[1])
EXTRAS = ("gymnasium", "hydra", "lightning", "mujoco")
if missing := [name for name in EXTRAS if find_spec(name) is None]:
    sys.exit(f"{', '.join(missing)} not installed: pip install 'alm-torchrl[recipes]'")
if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # videos without a screen

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase

from alm_torchrl.envs import RenderFrames, make_env
from alm_torchrl.evaluation import evaluate_policy
from recipes.trained import add_arguments, find, main

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
    torch.manual_seed(args.seed)
    num_envs = min(args.episodes, PARALLEL)
    env = make_env(**trained.environment, num_envs=num_envs, seed=args.seed)
    returns = evaluate_policy(env, policy, args.episodes)
    env.close()
    task, known = trained.environment["task"], trained.evaluation
    mean, std = returns.mean(), returns.std(correction=0)
    print(f"{task}: return {mean:.1f} +- {std:.1f} over {args.episodes} episodes; {trained.path}")
    if known.keys() >= {"mean", "std", "episodes"}:
        print("model card: return {mean:.1f} +- {std:.1f} over {episodes} episodes".format(**known))
    if args.video is not None:
        torch.manual_seed(args.seed)
        record(trained.environment, policy, args)


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
    every, fps = thin(env, environment.get("action_repeat", 1))
    with torch.no_grad():
        rollout = env.rollout(max(1, round(args.seconds * fps * every)), policy)
    pixels = rollout["pixels"][::every]
    if pixels.shape[-1] != 3:  # stacks, the newest frame last
        pixels = pixels[:, -3:].movedim(1, -1)
    write(pixels, args.video, fps, args.width)
    print(f"{len(pixels)} frames: {args.video}")


def thin(env: EnvBase, action_repeat: int) -> tuple[int, float]:
    """Renders only the frames that are kept; returns their distance in steps and their rate."""
    rate = (getattr(env, "metadata", None) or {}).get("render_fps", FRAMES_PER_SECOND)
    every = max(1, round(rate / action_repeat / FRAMES_PER_SECOND))
    for frames in (part for part in env.modules() if isinstance(part, RenderFrames)):
        if not frames.channels_first:  # not an observation of the agent
            frames.render = sparse(frames.render, every)
    return every, rate / action_repeat / every


def sparse(render: Callable[[], Any], every: int) -> Callable[[], Any]:
    """Returns a function that renders at every so many calls and repeats the frame in between."""
    calls, last = count(), [None]

    def frame() -> Any:
        if next(calls) % every == 0:
            last[0] = render()
        return last[0]

    return frame


def write(pixels: Tensor, path: Path, fps: float, width: int) -> None:
    """Writes frames ``[T, H, W, 3]`` as GIF or MP4."""
    from PIL import Image

    frames = [Image.fromarray(frame.contiguous().numpy()) for frame in pixels]
    for frame in frames:
        frame.thumbnail((width, width))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp4":
        import imageio

        arrays: list[Any] = [np.asarray(frame) for frame in frames]
        imageio.mimwrite(path, arrays, fps=fps, macro_block_size=2)
    else:
        duration = round(1000 / fps)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)


if __name__ == "__main__":
    main(play)

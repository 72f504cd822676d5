"""Exports the policy of a trained agent: ``python recipes/export.py RUN [--out exported]``.

RUN is a run's folder, an agent's file, a name under pretrained/, or OWNER/NAME on the hub. Writes
the deterministic policy (means of latent and action) as ``policy.pt2`` (torch.export) and
``policy.onnx``, and checks both against the agent on observations of its task.
"""

from __future__ import annotations

import argparse
import logging
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
from tensordict.utils import NestedKey, unravel_key_list
from torch import Tensor
from torch.export import Dim, ExportedProgram

from alm_torchrl.envs import make_env
from alm_torchrl.files import atomic_write, one_line
from recipes.trained import Trained, add_arguments, find, main

STEPS = 1_000  # observations to compare on
TOLERANCE = 1e-5  # of the largest entry of an output, if that exceeds 1
INSTALL = "pip install 'alm-torchrl[export]'"


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("exported"), help="folder of the files")
    return parser.parse_args()


@torch.no_grad()
def export() -> None:
    """Loads the agent, and writes and checks both files."""
    args = parse_arguments()
    trained = find(args.agent, args.task)
    policy = trained.agent.policy(latent="mean")
    observations = observe(trained, policy)
    expected = outputs(policy(*observations))
    args.out.mkdir(parents=True, exist_ok=True)

    program = to_program(policy, observations)
    save(args.out / "policy.pt2", program, outputs(program.module()(*observations)), expected)

    if absent := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        print(f"no ONNX file: {' and '.join(absent)} not installed ({INSTALL})")
        return
    content = to_onnx(policy, program)
    found = run_onnx(content, observations) if find_spec("onnxruntime") else None
    save(args.out / "policy.onnx", content, found, expected)


def observe(trained: Trained, policy: TensorDictModuleBase) -> tuple[Tensor, ...]:
    """Plays with the policy and returns its inputs."""
    torch.manual_seed(0)
    env = make_env(**trained.environment, seed=0)
    data = env.rollout(STEPS, policy, break_when_any_done=False)
    env.close()
    return tuple(data[key] for key in policy.in_keys)


def outputs(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the outputs of a policy, of which one is not in a tuple."""
    return values if isinstance(values, tuple) else (values,)


def to_program(policy: TensorDictModuleBase, observations: tuple[Tensor, ...]) -> ExportedProgram:
    """Exports a policy for batches of any size."""
    shapes = ({0: Dim("batch")},) * len(observations)
    try:
        return torch.export.export(policy, observations, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # a network of the user may do anything
        raise ValueError(f"torch.export cannot export the policy: {one_line(error)}") from error


def to_onnx(policy: TensorDictModuleBase, program: ExportedProgram) -> bytes:
    """Converts an exported policy to ONNX with named inputs and outputs."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not needed
    names: Any = {"input_names": join(policy.in_keys), "output_names": join(policy.out_keys)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code
        try:
            converted: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        except Exception as error:
            raise ValueError(
                f"the policy cannot be converted to ONNX: {one_line(error)}"
            ) from error
    return converted.model_proto.SerializeToString()


def join(keys: list[NestedKey]) -> list[str]:
    """Returns keys as names, such as ``robot_joints``."""
    return [key if isinstance(key, str) else "_".join(key) for key in unravel_key_list(keys)]


def run_onnx(content: bytes, observations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Runs an ONNX file with onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content)
    names = [entry.name for entry in session.get_inputs()]
    arrays = {name: data.numpy() for name, data in zip(names, observations, strict=True)}
    return tuple(map(torch.from_numpy, session.run(None, arrays)))


def save(
    path: Path,
    content: bytes | ExportedProgram,
    found: tuple[Tensor, ...] | None,
    expected: tuple[Tensor, ...],
) -> None:
    """Writes a file whose outputs are those of the policy, as far as they are known."""
    if found is None:
        checked = f"not checked, because onnxruntime is not installed ({INSTALL})"
    else:
        error = max(difference(*pair) for pair in zip(found, expected, strict=True))
        checked = f"differs from the agent by {error:.1e} on {STEPS:,} observations"
        if not error <= TOLERANCE:
            raise ValueError(f"{path} {checked}, more than {TOLERANCE}; it was not written")
    with atomic_write(path) as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.export.save(content, file)
    print(f"{path}: {checked}")


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest expected entry if that exceeds 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


if __name__ == "__main__":
    main(export)

"""Measures speed: ``python -m benchmarks update terms --task humanoid --out results/benchmarks``.

Each suite times its cases in alternating rounds in one process and prints medians, quartiles and
ratios. ``memory``, ``loop`` and ``saving`` are one long run each; ``epochs`` counts the epochs of
MBPO's model. ``claims`` prints the table of the paper's claims from the records in ``--out`` and
the curves in ``results``: ``python -m benchmarks peers epochs claims --out results/benchmarks``.
Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from alm_torchrl.training import silence_library_warnings
from benchmarks.claims import ROOT, claims
from benchmarks.long import loop, memory
from benchmarks.mbpo import MBPO_SIZES, count_epochs
from benchmarks.measure import alternate, peak_memory
from benchmarks.report import table, write, write_record
from benchmarks.saving import saving
from benchmarks.suites import MBPO_TRANSITIONS, SUITES
from benchmarks.workloads import TASKS
from experiments.machine import describe_machine

CHOICES = (*SUITES, "memory", "loop", "saving", "epochs", "claims")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(CHOICES))
    parser.add_argument("--task", choices=TASKS, default="halfcheetah")
    parser.add_argument("--rounds", type=int, default=15, help="samples per case")
    parser.add_argument("--updates", type=int, default=10_000, help="updates of `memory`")
    parser.add_argument("--steps", type=int, default=500, help="environment steps of a run")
    parser.add_argument(
        "--transitions", type=int, default=1_000_000, help="size of the replay buffer of `saving`"
    )
    parser.add_argument("--short", action="store_true", help="quickstart sizes, three rounds")
    parser.add_argument("--threads", type=int, help="threads per operator (default: torch decides)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for a JSON file and a plot per suite")
    parser.add_argument(
        "--option", action="append", default=[], help="recipe option for `loop`; repeatable"
    )
    arguments = parser.parse_args()
    arguments.suites = arguments.suites or ["terms", "peers", "step"]
    if unknown := set(arguments.suites) - set(CHOICES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; choose from {', '.join(CHOICES)}")
    if not arguments.short and arguments.rounds < 2:
        parser.error("--rounds must be at least 2 to measure the spread")
    if arguments.short:
        arguments.rounds, arguments.updates, arguments.steps = 3, 200, 100
        arguments.transitions = 20_000
    return arguments


def long_run(
    name: str, arguments: argparse.Namespace, device: torch.device
) -> tuple[str, dict[str, Any]]:
    """Runs a suite without cases; returns what it prints and its record, which may be empty."""
    task = arguments.task
    if name == "memory":
        return memory(task, device, arguments.updates)
    if name == "saving":
        return saving(task, device, arguments.transitions, arguments.steps)
    if name == "loop":
        return loop(task, device, arguments.steps, arguments.option)
    if task not in MBPO_SIZES:
        raise SystemExit(f"{name}: MBPO learns from vectors; choose another --task")
    if name == "epochs":
        return count_epochs(task, MBPO_TRANSITIONS, MBPO_SIZES[task])
    records = arguments.out or ROOT / "results/benchmarks"
    return claims(records, ROOT / "results", task, device.type), {}


def main() -> None:
    """Runs the suites in order."""
    arguments = parse_arguments()
    silence_library_warnings()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    task, device = arguments.task, torch.device(arguments.device)
    facts = describe_machine(device)
    print("  ".join(f"{name}: {value}" for name, value in facts.items()))
    for name in arguments.suites:
        torch.manual_seed(0)
        torch._dynamo.reset()
        label = f"{name}-{task}-{device.type}"
        if name in SUITES:
            suite = SUITES[name](task, device, arguments.short)
            alternate(suite.cases, arguments.rounds)
            print(f"\n{name}\n{table(suite)}", flush=True)
            if arguments.out:
                write(arguments.out, label, suite, {**facts, "peak_memory": peak_memory(device)})
            continue
        line, content = long_run(name, arguments, device)
        print(f"\n{name}\n{line}", flush=True)
        if arguments.out and content:
            write_record(arguments.out, label, content, facts)
        if content.get("leaks"):
            sys.exit("memory grows")
    print(f"\npeak memory {peak_memory(device) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

"""The suites: which cases are timed side by side, and against which of them the ratios are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torchrl.objectives import REDQLoss, SACLoss

from alm_torchrl.agent import ALMAgent
from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import make_env
from benchmarks.measure import Case, copy_case, matmul_case
from benchmarks.workloads import QUICKSTART, TASKS, Sizes, Update, alm, alm_terms, peer

REDQ_UPDATES_PER_STEP = 20


@dataclass
class Suite:
    """Cases to time in turn.

    Attributes:
        cases: what is timed.
        reference: the name of the case that ratios are against.
        note: what a reader should know.
    """

    cases: list[Case]
    reference: str
    note: str = ""


def update(task: str, device: torch.device, short: bool) -> Suite:
    """One whole update in every precision, eager and compiled, beside the machine's peaks."""
    sizes = QUICKSTART if short else Sizes()
    cases = [
        matmul_case(torch.float32, device),
        matmul_case(torch.bfloat16, device),
        copy_case(device),
    ]
    flops = alm(TASKS[task], device, sizes).flops()
    for compiled in (False, True):
        for precision in ("32", "bf16"):
            work = alm(TASKS[task], device, sizes, precision=precision, compiled=compiled)
            name = f"update: {'compiled' if compiled else 'eager'} {precision}"
            cases.append(Case(name, work, flops=flops))
    return Suite(cases, "update: eager 32", f"{task}, {sizes}; one batch, its draw excluded")


def terms(task: str, device: torch.device, short: bool) -> Suite:
    """The five losses apart, each with its gradients."""
    sizes = QUICKSTART if short else Sizes()
    whole = alm(TASKS[task], device, sizes)
    cases = [Case("whole update", whole), Case("all losses", _cleared(whole))]
    cases += [Case(name, work) for name, work in alm_terms(whole).items()]
    note = f"{task}, {sizes}; apart, every term encodes the batch anew"
    return Suite(cases, "whole update", note)


def peers(task: str, device: torch.device, short: bool) -> Suite:
    """What one environment step costs: ALM, and TorchRL's SAC and REDQ in their settings."""
    sac, redq = (peer(kind, TASKS[task], device) for kind in (SACLoss, REDQLoss))

    def redq_step() -> None:
        for _ in range(REDQ_UPDATES_PER_STEP):
            redq()

    cases = [
        Case("SAC, widths 256, batch 256, 1 update", sac),
        Case(f"REDQ, widths 256, batch 256, {REDQ_UPDATES_PER_STEP} updates", redq_step),
        Case("ALM, quickstart, 1 update", alm(TASKS[task], device, QUICKSTART)),
    ]
    if not short:
        cases += [
            Case("ALM, paper, 1 update", alm(TASKS[task], device)),
            Case("ALM, paper, 1 update, bf16", alm(TASKS[task], device, precision="bf16")),
        ]
    note = (
        f"{task}; losses, gradients and optimiser of one environment step. TorchRL's REDQLoss "
        "updates the actor along with every update of the values"
    )
    return Suite(cases, cases[0].name, note)


def step(task: str, device: torch.device, short: bool) -> Suite:
    """What else a training step holds: acting, the environment, and the draw of a batch."""
    sizes = QUICKSTART if short else Sizes()
    env = make_env(TASKS[task].id, seed=0)
    agent = ALMAgent.from_env(env, hidden_dim=sizes.hidden, dynamics_hidden_dim=sizes.dynamics).to(
        device
    )
    policy = agent.policy()
    replay = make_replay_buffer(
        100_000, batch_size=sizes.batch, window_length=sizes.horizon, device=device
    )
    collector = make_collector(env, policy, policy_device=device)
    data = iter(collector)
    filled = next(iter(make_collector(make_env(TASKS[task].id), None, frames_per_batch=2000)))
    replay.extend(filled)
    observation = filled[:1].select("observation").to(device)

    def act() -> None:
        with torch.no_grad():
            policy(observation.copy())

    whole = alm(TASKS[task], device, sizes)
    cases = [
        Case("update", whole),
        Case("acting", act, repeats=20),
        Case("acting and environment (collector)", lambda: next(data), repeats=20),
        Case("draw of a batch", replay.sample, repeats=5),
        Case("write and draw", lambda: (replay.extend(filled[:1]), replay.sample()), repeats=5),
    ]
    return Suite(cases, "update", f"{task}, {sizes}")


def scaling(task: str, device: torch.device, short: bool) -> Suite:
    """The cost of an update as batch, horizon and widths grow."""
    base = QUICKSTART if short else Sizes()
    variants = {"base": base}
    for factor in (2, 4):
        variants[f"batch x{factor}"] = replace(base, batch=factor * base.batch)
    for horizon in (1, 5, 10):
        variants[f"horizon {horizon}"] = replace(base, horizon=horizon)
    wide = replace(base, hidden=2 * base.hidden, dynamics=2 * base.dynamics)
    variants["widths x2"] = wide
    cases = [Case(name, alm(TASKS[task], device, sizes)) for name, sizes in variants.items()]
    return Suite(cases, "base", f"{task}, {base}, eager")


def _cleared(work: Update) -> Callable[[], None]:
    def losses() -> None:
        work.backward()
        work.optimizer.zero_grad()

    return losses


SUITES = {
    "update": update,
    "terms": terms,
    "peers": peers,
    "step": step,
    "scaling": scaling,
}

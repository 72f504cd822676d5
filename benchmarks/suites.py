"""The suites: groups of cases that are timed in alternation, with a reference case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torchrl.objectives import REDQLoss, SACLoss

from alm_torchrl.data import make_collector, make_replay_buffer
from alm_torchrl.envs import frame_stacks, make_env
from alm_torchrl.training.runtime import choose_precision
from benchmarks.environments import collection
from benchmarks.mbpo import MBPO_SIZES, MBPOWork
from benchmarks.measure import Case, copy_case, matmul_case
from benchmarks.scale import PARTS, Kind, training_step, worker_cases
from benchmarks.workloads import (
    QUICKSTART,
    TASKS,
    ALMWork,
    PeerWork,
    Sizes,
    Task,
    flops,
    stable_baselines_sac,
    windows,
)

REDQ_UPDATES_PER_STEP = 20
#: Sizes of the replay buffer at which MBPO's model is trained.
MBPO_TRANSITIONS = (5000, 20_000)
NUM_ENVS = (1, 64, 1024)
FRAMES = 1024
SEEDS = 5
SCALES: dict[Kind, tuple[int, ...]] = {
    "pendulums": (1, 4, 16, 64, 256, 1024),
    "environments": (1, 4, 16, 64),
    "seeds": (1, 2, 5, 10, 20),
    "transitions": (10_000, 100_000, 1_000_000, 10_000_000),
}
WORKERS = {"multi": 2}
WORKER_FRAMES = 1000

#: Names of cases that `claims` reads.
SAC, SAC_COMPILED = "SAC of TorchRL", "SAC of TorchRL, compiled"
REDQ_DEFAULT = "REDQ of TorchRL, a step of 20 updates"
REDQ_PUBLISHED = "REDQ, a step of 20 updates, one of the actor"
MBPO_IMAGINE = "MBPO: imagined transitions of a model"
ALM_SMALL, ALM_PAPER = "ALM, quickstart", "ALM, paper"


def mbpo_epoch(transitions: int) -> str:
    """Returns the name of the case for an epoch of MBPO's model."""
    return f"MBPO: an epoch of its model, {transitions} transitions"


@dataclass
class Suite:
    """Cases to time in alternation.

    Attributes:
        cases: the cases.
        reference: name of the case that ratios refer to.
        note: remark above the table.
        parts: names of the cases that make up each whole step; their shares are shown.
    """

    cases: list[Case]
    reference: str
    note: str = ""
    parts: dict[str, list[str]] = field(default_factory=dict)


def update(task: str, device: torch.device, short: bool) -> Suite:
    """Times an update in every precision and execution mode, and the machine's peaks."""
    sizes = QUICKSTART if short else Sizes()
    make = partial(ALMWork, TASKS[task], device, sizes)
    native = choose_precision("auto", device) == "bf16-mixed"
    cases = [
        matmul_case(torch.float32, device),
        # A processor without bfloat16 needs a minute for the large product.
        matmul_case(torch.bfloat16, device, size=2048 if native else 256),
        copy_case(device),
    ]
    arithmetic = flops(make())
    executions = {"eager": {}, "compiled": {"compiled": True}}
    if device.type == "cuda":
        executions["captured"] = {"captured": True}
        executions["compiled and captured"] = {"compiled": True, "captured": True}
    for name, options in executions.items():
        for precision in ("32-true", "bf16-mixed"):
            work = make(precision=precision, **options)
            cases.append(Case(f"update: {name} {precision}", work, flops=arithmetic, warmup=8))
    note = f"{task}, {sizes}; on one batch, without sampling"
    return Suite(cases, "update: eager 32-true", note)


def terms(task: str, device: torch.device, short: bool) -> Suite:
    """Times each loss with its gradients."""
    sizes = QUICKSTART if short else Sizes()
    whole = ALMWork(TASKS[task], device, sizes)
    cases = [Case("whole update", whole), Case("all losses", whole.all_terms)]
    cases += [Case(name, work) for name, work in whole.terms().items()]
    note = f"{task}, {sizes}; each loss alone encodes the batch again"
    return Suite(cases, "whole update", note)


def peers(task: str, device: torch.device, short: bool) -> Suite:
    """Times the updates of one environment step of ALM, SAC and REDQ, and the parts of MBPO's."""
    sizes = TASKS[task]
    if sizes.pixels:
        raise SystemExit("peers: SAC and REDQ are measured on vectors; choose another --task")
    sac = PeerWork(SACLoss, sizes, device)
    cases = [
        Case(SAC, sac),
        Case(REDQ_DEFAULT, redq_step(sizes, device, actor_every=1)),
        Case(REDQ_PUBLISHED, redq_step(sizes, device, actor_every=REDQ_UPDATES_PER_STEP)),
        *mbpo_cases(task, sac, device),
        Case(ALM_SMALL, ALMWork(sizes, device, QUICKSTART)),
    ]
    if not short:
        cases += [
            Case(ALM_PAPER, ALMWork(sizes, device)),
            Case("ALM, paper, bf16", ALMWork(sizes, device, precision="bf16-mixed")),
            Case(SAC_COMPILED, PeerWork(SACLoss, sizes, device, compiled=True), warmup=4),
        ]
    note = f"{task}; eager; SAC and REDQ with widths and batch 256"
    if (baseline := stable_baselines_sac(sizes, device)) is not None:
        cases.append(Case("SAC of Stable-Baselines3, draw included", baseline))
    else:
        note += ". For Stable-Baselines3: pip install 'alm-torchrl[bench]'"
    return Suite(cases, cases[0].name, note)


def redq_step(task: Task, device: torch.device, actor_every: int) -> Callable[[], None]:
    """Returns a function with REDQ's updates of one environment step."""
    redq = PeerWork(REDQLoss, task, device, actor_every=actor_every)

    def step() -> None:
        for _ in range(REDQ_UPDATES_PER_STEP):
            redq()

    return step


def mbpo_cases(task: str, sac: PeerWork, device: torch.device) -> list[Case]:
    """Returns the parts of MBPO's step apart from the updates of SAC."""
    transitions = windows(TASKS[task], (max(MBPO_TRANSITIONS),), device)
    work = MBPOWork(sac.actor, transitions, MBPO_SIZES[task])
    epochs = [Case(mbpo_epoch(count), work.epoch(count)) for count in MBPO_TRANSITIONS]
    return [*epochs, Case(MBPO_IMAGINE, work.imagine)]


def step(task: str, device: torch.device, short: bool) -> Suite:
    """Times the parts of a training step: collection, replay buffer and update."""
    sizes = QUICKSTART if short else Sizes()
    compiled = device.type == "cuda" and not short
    work = ALMWork(TASKS[task], device, sizes, compiled=compiled, captured=device.type == "cuda")
    make = partial(make_env, TASKS[task].id, **TASKS[task].options())
    env = make(seed=0)
    replay = make_replay_buffer(
        100_000 if not TASKS[task].pixels else 10_000,
        batch_size=sizes.batch,
        window_length=sizes.horizon,
        device=device,
        frame_stacks=frame_stacks(env),
    )
    policy = work.agent.policy()
    collector = make_collector(env, policy, policy_device=device)
    data = iter(collector)
    filled = next(iter(make_collector(make(), None, frames_per_batch=2000)))
    filled["next", "done"][-1] = True
    replay.extend(filled)
    following = next(iter(make_collector(make(), None, frames_per_batch=1)))
    following["next"].update(
        following.select(*policy.in_keys)
    )  # a transition that can follow itself
    observation = filled[:1].select(*policy.in_keys).to(device)

    def act() -> None:
        with torch.no_grad():
            policy(observation.copy())

    parts = ["acting and environment (collector)", "write and draw", "update"]
    cases = [
        Case("update", work, warmup=8),
        Case("acting", act, repeats=20),
        Case(parts[0], lambda: next(data), repeats=20),
        Case("draw", replay.sample, repeats=20),
        Case(parts[1], lambda: (replay.extend(following), replay.sample()), repeats=20),
    ]
    return Suite(cases, "update", f"{task}, {sizes}", {"a whole step": parts})


def seeds(task: str, device: torch.device, short: bool) -> Suite:
    """Times the joint update of several seeds."""
    sizes = QUICKSTART if short else Sizes()
    compiled, captured = not short, device.type == "cuda"
    make = partial(ALMWork, TASKS[task], device, sizes, compiled=compiled, captured=captured)
    cases = [Case(f"{count} seeds at once", make(seeds=count), warmup=8) for count in (1, 2, SEEDS)]
    note = f"{task}, {sizes}, compiled={compiled}, captured={captured}; one update of every seed"
    return Suite(cases, cases[0].name, note)


def scaling(task: str, device: torch.device, short: bool) -> Suite:
    """Times an update with larger batches, horizons and widths."""
    base = QUICKSTART if short else Sizes()
    variants = {"base": base}
    for factor in (2, 4):
        variants[f"batch x{factor}"] = replace(base, batch=factor * base.batch)
    for horizon in (1, 5, 10):
        variants[f"horizon {horizon}"] = replace(base, horizon=horizon)
    wide = replace(base, hidden=2 * base.hidden, dynamics=2 * base.dynamics)
    variants["widths x2"] = wide
    cases = [Case(name, ALMWork(TASKS[task], device, sizes)) for name, sizes in variants.items()]
    return Suite(cases, "base", f"{task}, {base}, eager")


def environments(task: str, device: torch.device, short: bool) -> Suite:
    """Times collector and replay buffer with 1, 64 and 1,024 environments, for as many frames."""
    sizes = QUICKSTART if short else Sizes()
    works = {count: collection(count, FRAMES, device, sizes) for count in NUM_ENVS}
    cases = [
        Case(
            f"{part}, {count} environment{'s' * (count > 1)}",
            work[part],
            repeats=1 if part == "collect" else 20,
            frames=0 if part == "draw" else FRAMES,
        )
        for part in ("collect", "write", "draw")
        for count, work in works.items()
    ]
    note = (
        f"pendulums in torch instead of {task}, {sizes}; collect and write {FRAMES} frames, draw "
        f"{sizes.batch} windows"
    )
    return Suite(cases, cases[0].name, note)


def scale(kinds: tuple[Kind, ...], task: str, device: torch.device, short: bool) -> Suite:
    """Times a training step at the quickstart's sizes with increasing numbers of something."""
    steps = {
        f"{kind} {count:,}": training_step(kind, count, TASKS[task], device, QUICKSTART)
        for kind in kinds
        for count in (SCALES[kind][:2] if short else SCALES[kind])
    }
    parts = {name: [f"{name}: {part}" for part in PARTS] for name in steps}
    cases = [
        Case(case, getattr(step, part))
        for (name, step) in steps.items()
        for case, part in zip(parts[name], PARTS, strict=True)
    ]
    note = f"{task}, {QUICKSTART}, eager; a step of every environment, an update of every seed"
    return Suite(cases, cases[PARTS.index("update")].name, note, parts)


def scale_disk(task: str, device: torch.device, _: bool) -> Suite:
    """Times draws from a replay buffer whose files are on the disk, but not in memory."""
    count = SCALES["transitions"][-1]
    step = training_step("transitions", count, TASKS[task], device, QUICKSTART)
    cases = [
        Case("removing the files from the memory, as preparation", step.evict),
        Case(f"transitions {count:,}: draw from the disk", step.draw),
    ]
    return Suite(cases, cases[1].name, f"{task}, {QUICKSTART}")


def workers(task: str, *_: object) -> Suite:
    """Times collection in workers on the CPU, and sending weights to them."""
    cases, note = worker_cases(TASKS[task], WORKER_FRAMES, QUICKSTART, WORKERS)
    return Suite(cases, cases[0].name, note)


SUITES: dict[str, Callable[[str, torch.device, bool], Suite]] = {
    "update": update,
    "terms": terms,
    "peers": peers,
    "step": step,
    "seeds": seeds,
    "scaling": scaling,
    "environments": environments,
    "scale_environments": partial(scale, ("pendulums", "environments")),
    "scale_seeds": partial(scale, ("seeds",)),
    "scale_replay": partial(scale, ("transitions",)),
    "scale_disk": scale_disk,
    "workers": workers,
}

"""The experiments as data: image sets, configurations, seeds, and what is evaluated of each checkpoint."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

FULL, ANIL, BOIL = "11111", "00001", "11110"
FIXED = "00011"
SEEDS = (0, 1)
SELECT_SEED, TEST_SEED = 1000, 2000  # of the tasks, as `lambda-maml select` and `lambda-maml eval` have them

COMMON: dict[str, Any] = {
    "ways": 5, "query": 15, "steps": 5, "test_steps": 10, "second_order": False, "meta_batch": 4, "meta_lr": 1e-3,
    "average": 0.999, "val_tasks": 200, "val_every": 500,
}  # fmt: skip
CIFAR: dict[str, Any] = {"lr": 0.05, "flip": True, "crop": 4}
# Few support images gain by second derivatives; of half of the iterations these are worth their time (MAML++).
CIFAR_1: dict[str, Any] = {**CIFAR, "second_order": True}
# With 64 channels: twice the updates, of half the tasks each, at twice the rate. With 32 and one support image these
# came to 49.4% of the validation tasks' images after 47,000 updates, the others to 49.3% after 22,500. With 64 and one
# support image 14,000 were too few: 48.2%.
SMALL: dict[str, Any] = {"meta_batch": 2, "meta_lr": 2e-3, "val_every": 1000}


@dataclass(frozen=True, eq=False)
class Case:
    """An image set at so many support images a class, and what of the training depends on it."""

    dataset: str
    shots: int
    width: int  # channels of each convolution
    iterations: int
    settings: dict[str, Any]
    wide: bool = False  # more channels than the set's other case has, which the name then says
    # Settings of `lambda_maml.pretrain.Pretraining`; or, with `iterations`, those of a meta-training with `ridge_head`.
    pretraining: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.dataset}-{self.shots}shot" + (f"-{self.width}ch" if self.wide else "")


class Arm(NamedTuple):
    """What differs from MAML with one rate, and where it is tried."""

    settings: dict[str, Any]
    words: str
    cases: Sequence[Case]
    # `select_pattern`'s: a race is for one allowed drop, and takes a fraction of the adaptations.
    search: str = "all"
    choices: str = "last"  # after which numbers of steps patterns are chosen: "all", the "first" or the "last"


CORE = (
    Case("cifar_fs", 5, 32, 20000, CIFAR),
    Case("cifar_fs", 1, 32, 24000, CIFAR_1),
    # With 32 channels in first order, 20,000 iterations end at 97.1% of the validation tasks' images.
    Case("omniglot", 1, 64, 20000, {"lr": 0.1, "second_order": True}),
    Case("omniglot", 5, 32, 12000, {"lr": 0.1}),
)
MORE = (
    Case("cifar_fs", 5, 64, 14000, {**CIFAR, **SMALL}, wide=True),
    Case("cifar_fs", 1, 64, 40000, {**CIFAR_1, **SMALL}, wide=True),
    Case("omniglot", 5, 64, 12000, {"lr": 0.1, **SMALL}, wide=True),
    Case("mini_imagenet", 5, 32, 12000, {"lr": 0.03, "flip": True}),
    Case("mini_imagenet", 1, 32, 20000, {"lr": 0.03, "flip": True}),
)
# Supervised pretraining, after which meta-training takes a fraction of the iterations. CIFAR-FS, 1-shot, 32 channels:
# 47.9% of the validation tasks' images after 500 iterations, where 24,000 from random weights end at 49.3%.
PLAIN = {"epochs": 30, "flip": True, "crop": 4}
TURNED = {"epochs": 15, "flip": True, "crop": 4, "rotations": True}  # of four times the images
# Not for Omniglot, where 4 epochs on its 4,112 classes (79.7% of the images told rightly) bring 64 channels to 92.0% of
# the validation tasks' images within 3,000 iterations; from random weights it is 94.5%. There features are made for
# ridge regression in tasks of many classes (R2-D2 of Bertinetto et al. 2019, the many ways of Snell et al. 2017): the
# training loss of 5-way tasks falls to 0.02, and they teach little more.
MANY_WAYS = {
    "ways": 20, "shots": 1, "query": 5, "pattern": ANIL, "zero_head": True, "second_order": True, "meta_batch": 4,
    "meta_lr": 2e-3, "average": 0.999, "val_tasks": 100, "val_every": 500, "crop": 2, "cosine": 6000,
    "iterations": 6000, "ridge_head": {"lam": 1, "learned": True, "scale": 10},
}  # fmt: skip
OMNIGLOT: dict[str, Any] = {"lr": 0.1, "zero_head": True, "crop": 2, "val_every": 250}
# CIFAR-FS, one support image, 64 channels, share of the validation tasks' images: 51.1% with a meta-learned head, after
# PLAIN; 51.9% with a zero head, after 60 epochs of it; 52.4% with a zero head, after TURNED; 52.9% with 4 tasks a
# meta-batch and not 2. A meta-learned head gains nothing by 10,000 iterations (51.6%) or by 60 epochs of PLAIN (50.6%).
# A zero head gains nothing by a cosine classifier in pretraining (51.7%), or by turned classes in meta-training too
# (50.7%).
PRETRAINED = (
    Case("cifar_fs", 5, 64, 3000, {**CIFAR, "meta_batch": 2}, wide=True, pretraining=PLAIN),
    Case("cifar_fs", 1, 64, 3000, {**CIFAR, "zero_head": True}, wide=True, pretraining=TURNED),
    Case("omniglot", 1, 64, 1500, {**OMNIGLOT, "meta_lr": 2e-4}, pretraining=MANY_WAYS),
    Case("omniglot", 5, 64, 2000, {**OMNIGLOT, "meta_lr": 5e-4}, wide=True, pretraining=MANY_WAYS),
    Case("fc100", 5, 64, 3000, {**CIFAR, "zero_head": True}, wide=True, pretraining=TURNED),
    Case("fc100", 1, 64, 3000, {**CIFAR, "zero_head": True}, wide=True, pretraining=TURNED),
)
# With a zero head the support images' features are the head after one step: first order would not teach them that.
ONE_STEP: dict[str, Any] = {
    "steps": 1, "test_steps": 1, "lr": 0.3, "learn_lr": "layer-step", "zero_head": True, "pattern": ANIL,
    "second_order": True, "first_order_iterations": 0,
}  # fmt: skip
PRETRAINED_ONE_STEP = (
    Case("cifar_fs", 5, 64, 3000, CIFAR, wide=True, pretraining=TURNED),
    Case("cifar_fs", 1, 64, 8000, CIFAR, wide=True, pretraining=TURNED),
)
AFTER = tuple(case for case in PRETRAINED if case.dataset != "fc100")
# With the last layer alone in meta-training, 3,000 iterations of CIFAR-FS, one support image, end while the share of
# the validation tasks' images still grows, at 52.5%; on test tasks that is 0.58 ± 0.35 points below MAML (seed 0).
AFTER_FIXED = tuple(
    replace(case, iterations=8000) if (case.dataset, case.shots) == ("cifar_fs", 1) else case for case in AFTER
)
ARMS = {
    "maml": Arm({}, "MAML, one rate; patterns at meta-test only", CORE, choices="all"),
    "onestep": Arm(
        {"steps": 1, "test_steps": 1, "lr": 0.1, "learn_lr": "layer-step"}, "trained in one step, rates learned",
        [case for case in CORE if case.dataset == "cifar_fs"], choices="first",
    ),
    "fixed": Arm(
        {"pattern": FIXED}, f"`{FIXED}` in meta-training too", [case for case in CORE if case.dataset == "omniglot"]
    ),
    "pretrained": Arm({}, "MAML after pretraining; patterns at meta-test only", PRETRAINED, choices="all"),
    # The order within a name keeps `*-pretrained-*` of others apart.
    "onestep-pretrained": Arm(
        ONE_STEP, f"after pretraining, `{ANIL}` trained in one step from a zero head, rates learned",
        PRETRAINED_ONE_STEP, choices="first",
    ),
    # Second derivatives of the last layer alone cost little.
    "fixed-pretrained": Arm(
        {"pattern": ANIL, "second_order": True, "first_order_iterations": 0},
        f"after pretraining, `{ANIL}` in meta-training too, second order",
        AFTER_FIXED,
        "race",
    ),
    "rates-pretrained": Arm(
        {"learn_lr": "layer-step"}, "after pretraining, inner rates learned per layer and step", AFTER, "race"
    ),
    "sampled-pretrained": Arm(
        {"patterns": "sampled"}, "after pretraining, a pattern drawn for each meta-batch", AFTER, "race"
    ),
    "never-pretrained": Arm({"norm": "never"}, "after pretraining, norm weights never adapt", AFTER, "race"),
}  # fmt: skip

# Runs whose best checkpoint is kept beside their results: together they are less than 2 MB.
SHIPPED = {
    "cifar_fs-5shot-64ch-pretrained-s0", "cifar_fs-1shot-64ch-pretrained-s0", "omniglot-1shot-pretrained-s0",
    "omniglot-5shot-64ch-pretrained-s0", "omniglot-5shot-fixed-s0", "glyphs-1shot-maml-s0",
}  # fmt: skip


class Amount(NamedTuple):
    """How much is evaluated of each checkpoint."""

    steps: tuple[int, ...] = (1, 5, 10)
    test_tasks: int = 600
    val_tasks: int = 600
    drops: tuple[float, ...] = (0.01, 0.005)
    timing_seconds: float = 20.0  # of the patterns' adaptation, for each number of steps


@dataclass(frozen=True)
class Experiment:
    """One training run."""

    case: Case
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.case}-{self.arm}-s{self.seed}"

    @property
    def iterations(self) -> int:
        return self.case.iterations

    @property
    def settings(self) -> dict[str, Any]:
        """Those of `lambda_maml.train.Settings`."""
        found = {**COMMON, "shots": self.case.shots, **self.case.settings, **ARMS[self.arm].settings}
        if found["second_order"]:
            found.setdefault("first_order_iterations", self.iterations // 2)
        return {**found, "seed": self.seed, "cosine": self.iterations}

    @property
    def pretraining(self) -> str:
        """The name of the pretraining that it begins with, which runs of one image set, width, seed and way of
        pretraining share; "" for none."""
        if not self.case.pretraining:
            return ""
        own = self.case.pretraining
        way = "-turned" if "rotations" in own else f"-{own['ways']}ways" if "ways" in own else ""
        return f"{self.case.dataset}-{self.case.width}ch{way}-s{self.seed}"

    @property
    def clock(self) -> str:
        """The part of a name that says which adaptation times are its own."""
        return f"times-{self.settings.get('norm', 'follow')}" + ("-rates" if "learn_lr" in self.settings else "")

    @property
    def beside(self) -> Experiment:
        """The run of MAML whose full pattern it is set beside: after pretraining where that is so too."""
        return replace(self, arm="pretrained" if self.arm.endswith("-pretrained") else "maml")


@dataclass(frozen=True)
class Job:
    """One result file: what is done for it, after which others, and whether nothing else may run beside it."""

    name: str
    kind: str
    experiment: Experiment
    plan: dict[str, Any]
    needs: tuple[str, ...] = ()
    alone: bool = False
    steps: int = 0
    also: tuple[str, ...] = field(default=(), compare=False)  # names by which --only finds it too


def experiments(tiny: bool = False) -> list[Experiment]:
    """All of them, in the order in which they are run: an arm of all sets before the next arm."""
    if tiny:
        return [Experiment(TINY, "maml", 0)]
    pairs = [(case, name) for name, arm in ARMS.items() for case in arm.cases] + [(case, "maml") for case in MORE]
    return [Experiment(case, arm, seed) for case, arm in pairs for seed in SEEDS]


TINY = Case(
    "glyphs", 1, 4, 40,
    {"query": 2, "steps": 1, "test_steps": 2, "lr": 0.4, "meta_batch": 2, "val_tasks": 4, "val_every": 10},
)  # fmt: skip
TINY_AMOUNT = Amount((1, 2), 4, 4, timing_seconds=0.0)


def jobs(tiny: bool = False) -> Iterator[Job]:
    """All result files: times and memory first, while nothing else runs; then run after run with its evaluations."""
    return jobs_of(experiments(tiny), TINY_AMOUNT if tiny else Amount())


def jobs_of(runs: Sequence[Experiment], amount: Amount) -> Iterator[Job]:
    """Those of some runs."""
    seen: dict[str, Job] = {}
    for run in runs:
        network = {"dataset": run.case.dataset, "width": run.case.width, "shots": run.case.shots}
        plan = {**network, "steps": list(amount.steps), "norm": run.settings.get("norm", "follow")}
        learned = {key: run.settings[key] for key in ("learn_lr",) if key in run.settings}
        name = f"{run.case}.{run.clock}"
        seen.setdefault(
            name, Job(name, "times", run, {**plan, **learned, "seconds": amount.timing_seconds}, alone=True)
        )
        name = f"{run.case}.memory"
        seen.setdefault(name, Job(name, "memory", run, {**network, "steps": list(amount.steps)}, alone=True))
    yield from seen.values()
    for run in runs:
        network = {"dataset": run.case.dataset, "network": "conv4", "width": run.case.width}
        about = {**network, "settings": run.settings, "iterations": run.iterations}
        before: tuple[str, ...] = ()
        if run.pretraining:
            settings = {**run.case.pretraining, "seed": run.seed}
            before, about["pretraining"] = (f"{run.pretraining}.pretraining",), settings
            if before[0] not in seen:
                seen[before[0]] = Job(before[0], "pretraining", run, {**network, "settings": settings})
                yield seen[before[0]]
        trained = f"{run}.training"
        yield Job(trained, "training", run, about, before, also=(str(run),))
        tested = {**about, "test_tasks": amount.test_tasks, "test_seed": TEST_SEED}
        is_race = ARMS[run.arm].search == "race"
        patterns = list(dict.fromkeys([FULL, ANIL, *([] if is_race else [BOIL]), run.settings.get("pattern", FULL)]))
        plan = {**tested, "steps": list(amount.steps), "patterns": patterns}
        yield Job(f"{run}.accuracy", "accuracy", run, plan, (trained,), also=(str(run),))
        chosen_after = {"all": amount.steps, "first": amount.steps[:1], "last": amount.steps[-1:]}[
            ARMS[run.arm].choices
        ]
        for steps in chosen_after:
            plan = {
                **tested, "steps": steps, "val_tasks": amount.val_tasks, "select_seed": SELECT_SEED,
                **({"search": "race", "drops": [amount.drops[0]]} if is_race else {"drops": list(amount.drops)}),
            }  # fmt: skip
            needs = (trained, f"{run.case}.{run.clock}")
            yield Job(f"{run}.choice-k{steps}", "choice", run, plan, needs, steps=steps, also=(str(run),))
        if run.arm.endswith("-pretrained"):
            (steps,), is_one_step = chosen_after, ARMS[run.arm].choices == "first"
            which, others = ("best", list(amount.steps[:2])) if is_one_step else (f"{amount.drops[0]:g}", [steps])
            plan = {**tested, "beside": str(run.beside), "steps": steps, "which": which, "others_steps": others}
            both = (trained, f"{run}.choice-k{steps}", f"{run.beside}.training")
            yield Job(f"{run}.paired", "paired", run, plan, both, also=(str(run),))


def chosen(every: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs whose name, or whose run's name, fits one of the patterns of names, and those that they need.

    Raises:
        ValueError: nothing fits one of them.
    """
    if not only:
        return list(every)
    wanted: set[str] = set()
    for text in only:
        fits = {job.name for job in every if any(fnmatch.fnmatchcase(name, text) for name in (job.name, *job.also))}
        if not fits:
            runs = ", ".join(dict.fromkeys(name for job in every for name in job.also))
            raise ValueError(f"--only {text}: no run or result has such a name: choose from {runs}, or --list")
        wanted |= fits
    return [job for job in every if job.name in wanted | {need for j in every if j.name in wanted for need in j.needs}]

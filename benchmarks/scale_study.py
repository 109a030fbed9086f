"""What pruning and repairs cost as models grow: models are trained here, then cut, repaired, distilled and measured.

    python benchmarks/scale_study.py --minutes 25 --output DIR [--work DIR] [--pause-after 9] [--models NAME ...]
        [--ratios 0.5 0.75] [--repairs exact none least-squares reconstruct] [--tokens 1000000 4000000 250000 16000000]
        [--state-dtypes bfloat16 int8] [--workers 2]
    python benchmarks/scale_study.py --table --output DIR

It takes one to eight GPUs, and pip install -e '.[train]'. Each model of configs/scale that is asked for is trained by
flame/pretrain.py on the text of the packages that are installed on this machine: large models on all GPUs, one after
another; then small ones on one GPU each. Beside these trainings, --workers processes on each GPU take steps of
`recovery_study.py`: a dense model is measured and calibrated; shares of its state are removed, in the sizes that
`keyreduce prune --state-ratio` chooses for the last repair; what is left is repaired, and after the last repair
distilled from the dense model; each result is measured on held-out text, perplexity and recall. Perplexity is also
measured of the dense model and after the last repair with the state in other formats, rounded after each token. Seconds
are those of processes that share a GPU.

The output gets a JSON file for each model, rewritten after every step. Weights and text lie in the work folder,
which may be outside the repository. The same command resumes after an interruption, or after --pause-after minutes,
where a machine ends commands that take longer. --minutes count over all of these. The trainings divide a share of
them, times the number of GPUs. Large models come first, and small ones with the first of the shares removed; the first
two numbers of --tokens come before the others. A step that is not expected to end in time, by those of its kind that
were made, is left out, and so is one that does not; the files say which.
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from budget_study import measure
from gpu_workers import Ended, Workers
from recovery_study import Start, calibration_file, files_of, make_dense, make_run, make_start, slug
from scale_tables import print_tables

from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.models.miscompiled import has_wrong_gated_gradients
from keyreduce.outputs import read_json, write_json
from keyreduce.processes import Job, gpus, run_jobs

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "scale"
PAUSING = 45.0  # seconds that a training needs to save itself, and a new process to start
SHORTEST = 60.0  # seconds of a training for which it is worth to start
AFTER_LARGE = 3  # stages by which small models follow the large ones
LATER = 20  # stages by which what matters least follows the rest
FIRST_TOKENS = 2  # so many of the numbers of tokens matter more than the others
TRAINING = "training"
MICRO_BATCH = 16  # rows that a GPU takes at a time, at the most


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
        part: of the time of all trainings, on one GPU.
        learning_rate: the highest.
        micro_batch_in_torch: the most rows that a GPU takes at a time where the gated rule runs in PyTorch
            (keyreduce/models/miscompiled.py), which keeps more for the backward pass.
        alone: whether one GPU trains it, beside what others do, instead of all together.
    """

    part: float = 18
    learning_rate: float = 2e-3
    micro_batch_in_torch: int = MICRO_BATCH
    alone: bool = False


MODELS = {
    "delta-net-220m": Recipe(18, 1.2e-3),
    "gated-deltanet-220m": Recipe(18, 1.2e-3, 4),
    "qwen3-next-100m": Recipe(5, 1.4e-3, 8, alone=True),
    "qwen3-5-100m": Recipe(5, 1.4e-3, 8, alone=True),
    "olmo-hybrid-100m": Recipe(5, 1.4e-3, 8, alone=True),
    "delta-net-60m": Recipe(4, 1.6e-3, alone=True),
    "gated-deltanet-60m": Recipe(4, 1.6e-3, 8, alone=True),
    "delta-net-20m": Recipe(3, 2.4e-3, alone=True),
    "gated-deltanet-20m": Recipe(3, 2.4e-3, 8, alone=True),
}
"""A config of configs/scale -> how it is trained."""


def parse_arguments(words: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the folder of the JSON files")
    add("--table", action="store_true", help="print what is there, and do nothing")
    add("--minutes", type=float, default=25, help="of all calls together")
    add("--pause-after", type=float, metavar="MINUTES", help="end then; the same command resumes")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "keyreduce-scale-study", help="weights and text")
    add("--models", nargs="+", default=list(MODELS), help=f"of {', '.join(MODELS)}, or paths of configs")
    add("--train-share", type=float, default=0.44, help="of the minutes, for the trainings together")
    add("--ratios", nargs="+", default=["0.5", "0.75"], help="of the state, to remove")
    repairs = ["exact", "none", "least-squares", "reconstruct"]
    add("--repairs", nargs="+", default=repairs, help="as in recovery_study.py")
    kind = "full-distilled:lr=4e-5,batch_size=16,seq_len=1024"
    add("--kind", default=kind, help="the training after the last repair, as in recovery_study.py")
    add("--tokens", type=int, nargs="*", default=[1_000_000, 4_000_000, 250_000, 16_000_000], help="of that")
    add("--state-dtypes", nargs="*", default=["bfloat16", "int8"], help="formats of the state")
    add("--num-batches", type=int, default=64, help="of calibration and repair, 8 rows of 512 tokens each")
    add("--heldout-rows", type=int, default=128, help="of 1,024 tokens")
    add("--installed", nargs="+", type=Path, default=[], metavar="FOLDER", help="take text from these folders")
    add("--workers", type=int, default=2, help="processes on a GPU; they wait for the CPU at different times")
    add("--rows", type=int, default=64, help="of a training step")
    add("--row-length", type=int, default=2048, help="tokens of a training row")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Go on with the study until it or this call is over, and print what is there."""
    options = parse_arguments(words)
    if not options.table:
        study = Study(options)
        if study.train():
            study.measure()
    print_tables(options.output)


class Step(NamedTuple):
    """One thing to do for a model, whose result is a file.

    Attributes:
        model: the model's name.
        name: the step's, among those of the model.
        kind: what steps it is like, whose time tells how long it takes.
        stage: what comes before it, of all models, if there is not time for all.
        path: the file that is there when it was done.
        needs: files that must be there before.
        call: what a process calls.
        amount: the tokens that it trains on; 1 for other steps.
    """

    model: str
    name: str
    kind: str
    stage: int
    path: Path
    needs: tuple[Path, ...]
    call: partial
    amount: int = 1


class Study:
    """The state of a study: files in the work folder, and the clock."""

    def __init__(self, options: Namespace):
        self.options, self.devices = options, gpus()
        self.configs = {Path(name).stem: config_named(name) for name in options.models}
        self.began, self.clock = time.monotonic(), options.work / "clock.json"
        self.used_before = read_json(self.clock)["seconds"] if self.clock.exists() else 0.0
        self.left_out: dict[str, dict[str, str]] = {}
        # kind of a step -> parameters of a model times the amount, and the seconds that it took
        self.took: dict[str, list[tuple[int, float]]] = {}

    @property
    def left(self) -> float:
        """The seconds that are left of the study."""
        return 60 * self.options.minutes - self.used_before - (time.monotonic() - self.began)

    @property
    def left_of_call(self) -> float:
        """The seconds that are left of this call."""
        pause = self.options.pause_after
        return self.left if pause is None else min(self.left, 60 * pause - (time.monotonic() - self.began))

    def keep_time(self) -> None:
        """Write down the time that was used, for the next call."""
        used = self.used_before + time.monotonic() - self.began
        write_json(self.clock, {"seconds": round(used, 1)}, overwrite=True)

    def folder(self, model: str) -> Path:
        return self.options.work / model

    def trained(self, model: str) -> Path:
        """Return where the trained model is, or will be."""
        return self.folder(model) / "training" / "model"

    def leave_out(self, model: str, name: str, why: str) -> None:
        self.left_out.setdefault(model, {})[name] = why
        print(f"{model}, {name}: left out: {why}", flush=True)

    def train(self) -> bool:
        """Train the large models that are not trained, as long as there is time; return whether this is over."""
        self.prepare()
        for model in self.configs:
            minutes = self.minutes_of(model)
            if self.trained(model).exists() or recipe_of(model).alone:
                continue
            least = min(SHORTEST, 60 * minutes)
            if self.left < PAUSING + least:
                self.leave_out(model, TRAINING, "no time is left")
            elif self.left_of_call < PAUSING + least:
                print(f"{model}: to be trained in the next call", flush=True)
                return False
            else:
                self.train_one(model, minutes)
            self.keep_time()
            self.report(model)
        return True

    def prepare(self) -> None:
        """Make the text, and meanwhile let the GPUs compile the kernels of the trainings, unless that was done."""
        if (self.options.work / "text").exists():
            return
        kernels = self.options.work / "kernels"
        make_text = [*self.pretraining(next(iter(self.configs))), "--data", self.options.work / "text", "--text-only"]
        jobs = [self.job("text", [*make_text, "--output", kernels / "text", "--installed", *self.options.installed])]
        for model in self.configs if self.devices else ():
            words = [*self.pretraining(model), "--data", kernels / f"data-{model}", "--output", kernels / model]
            words += ["--text", ROOT / "keyreduce", "--heldout-text", ROOT / "benchmarks", "--heldout-rows", 8]
            micro = self.micro_batch(model, 1 if recipe_of(model).alone else len(self.devices))
            words += ["--steps", 1, "--batch-size", micro, "--micro-batch", micro]
            jobs.append(self.job(f"kernels-{model}", words))
        for outcome in run_jobs(jobs, workers=1 + 2 * len(self.devices), devices=self.devices):
            if outcome.code:
                print(f"{outcome.job.name}: {outcome.message}", flush=True)
        shutil.rmtree(kernels, ignore_errors=True)
        self.keep_time()

    def minutes_of(self, model: str) -> float:
        """Return how long a model is to be trained, which stays as it was said first."""
        path = self.folder(model) / "minutes.json"
        if not path.exists():
            options, together = self.options, len(self.devices) or 1
            parts = {name: recipe_of(name).part for name in self.configs}
            minutes = options.minutes * options.train_share * together * parts[model] / sum(parts.values())
            write_json(path, {"minutes": round(minutes if recipe_of(model).alone else minutes / together, 3)})
        return read_json(path)["minutes"]

    def train_one(self, model: str, minutes: float) -> None:
        """Train a model on all GPUs."""
        command = self.training_command(model, minutes)
        print(f"{model}: training for {minutes:.1f} minutes, {self.folder(model)}", flush=True)
        try:
            train_until(command, self.folder(model), time.monotonic() + self.left_of_call)
        except KeyreduceError as error:
            self.leave_out(model, TRAINING, str(error))

    def training_command(self, model: str, minutes: float) -> list[str]:
        """Return the command of a training, but for when it is to pause."""
        options, number = self.options, 1 if recipe_of(model).alone else len(self.devices) or 1
        rows, micro = max(1, options.rows // number), self.micro_batch(model, number)
        words = self.pretraining(model, number)
        words += ["--output", self.trained(model).parent, "--data", options.work / "text", "--minutes", minutes]
        words += ["--batch-size", rows * number, "--micro-batch", micro]
        words += ["--heldout-rows", 64, "--log-every", 20, "--save-every", 500, "--evaluate-every", 10**8]
        return list(map(str, [*words, "--installed", *options.installed]))

    def pretraining(self, model: str, processes: int = 1) -> list:
        """Return the words that say what is trained, and in which kernels."""
        words = [sys.executable]
        if processes > 1:
            words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        words += [ROOT / "flame" / "pretrain.py", "--config", self.configs[model], "--tokenizer", "bpe"]
        words += ["--seq-len", self.options.row_length, "--kernels", "fla", "--residual", "bfloat16"]
        return [*words, "--learning-rate", recipe_of(model).learning_rate]

    def micro_batch(self, model: str, processes: int) -> int:
        """Return how many rows a GPU takes at a time, of those of a step that are divided among so many."""
        rows = max(1, self.options.rows // processes)
        most = min(rows, recipe_of(model).micro_batch_in_torch if self.needs_torch(model) else MICRO_BATCH)
        return max(size for size in range(1, most + 1) if rows % size == 0)

    def job(self, name: str, words: list) -> Job:
        log = self.options.work / f"{name}-{time.time():.0f}.log"
        return Job(name, list(map(str, words)), log, {"PYTHONPATH": modules()})

    def needs_torch(self, model: str) -> bool:
        """Return whether the gated rule of a model is trained in PyTorch on the GPUs of this machine."""
        device = torch.device("cuda:0" if self.devices else "cpu")
        return has_wrong_gated_gradients(family_of(read_json(self.configs[model])), device)

    def measure(self) -> None:
        """Make all other steps, as long as there is time."""
        models = [model for model in self.configs if self.trained(model).exists() or recipe_of(model).alone]
        waiting = [step for model in models for step in self.steps(model)]
        known = {f"{step.model}/{step.name}": step for step in waiting}
        for step in waiting:
            if step.path.exists() and self.seconds_file(step).exists():
                self.learn(step, read_json(self.seconds_file(step))["seconds"])
        waiting = sorted((step for step in waiting if not step.path.exists()), key=lambda step: step.stage)
        workers = Workers(self.devices * self.options.workers)
        try:
            while waiting or workers.running:
                while workers.has_free and (step := self.next_of(waiting, workers.running)):
                    waiting.remove(step)
                    workers.start(f"{step.model}/{step.name}", step.call.func, *step.call.args)
                if not workers.running or self.left_of_call <= 0:
                    break
                for ended in workers.ended(self.left_of_call):
                    self.end(known[ended.name], ended)
        finally:
            interrupted = workers.running
            workers.close()
            self.keep_time()
        self.tell_missing([*(known[name] for name in interrupted), *waiting])
        for model in self.configs:
            self.report(model)

    def steps(self, model: str) -> list[Step]:
        """Return all steps of a model, but for a training on all GPUs."""
        options, chosen, alone = self.options, self.chosen(model), recipe_of(model).alone
        dense, trained = chosen.output / "dense.json", self.trained(model) / "training.json"
        first = AFTER_LARGE if alone else 0  # the stage of a model before its repairs
        found = []
        if alone:
            command, end = self.training_command(model, self.minutes_of(model)), time.monotonic() + self.left_of_call
            call = partial(train_until, command, self.folder(model), end)
            found.append(Step(model, TRAINING, TRAINING, 0, trained, (), call))
        found.append(Step(model, "dense", "dense", 0, dense, (trained,), partial(begin, chosen)))
        about = {"ratio": "state=0", "repair": "none"}
        last = first + len(options.repairs) + len(options.tokens) + 1
        found += self.in_formats(model, self.trained(model), dense, about, last)
        for place, ratio in enumerate(options.ratios):
            before, stage = dense, first + LATER * (alone and place > 0)
            for repair in options.repairs:
                start, stage = Start("auto", f"state={ratio}", repair, 0), stage + 1
                path, _ = files_of(chosen, start)
                name = f"{start.ratio} {repair}"
                # One after another, since the first one searches for the sizes of all.
                found.append(Step(model, name, repair, stage, path, (before,), partial(make_start, chosen, start)))
                before = path
            kind = self.kind(model)
            for number, tokens in enumerate(options.tokens, start=1):
                path = before.with_name(f"{slug(f'{kind}-{tokens}')}.json")
                call = partial(make_run, chosen, start, kind, tokens)
                place = stage + number + 2 * LATER * (number > FIRST_TOKENS)
                found.append(Step(model, f"{name} {tokens}", "distilled", place, path, (before,), call, tokens))
            found += self.in_formats(model, files_of(chosen, start)[1], before, start._asdict(), last)
        return found

    def kind(self, model: str) -> str:
        """Return the training after the last repair, in fla's kernels where these are right."""
        kind = self.options.kind
        if not self.devices or self.needs_torch(model) or "kernels=" in kind:
            return kind
        return f"{kind}{',' if ':' in kind else ':'}kernels=fla"

    def in_formats(self, model: str, folder: Path, before: Path, about: dict, stage: int) -> list[Step]:
        """Return the steps that measure what is in a folder with its state in other formats."""
        found, chosen = [], self.chosen(model)
        for dtype in self.options.state_dtypes:
            path, run = before.with_name(f"{before.stem}-{dtype}.json"), about | {"state_dtype": dtype}
            name = f"{about['ratio']} {about['repair']} {dtype}"
            call = partial(measure_format, chosen, folder, before, path, run)
            found.append(Step(model, name, "format", stage, path, (before,), call))
        return found

    def chosen(self, model: str) -> Namespace:
        """Return the options of recovery_study.py, with which the steps of a model are made."""
        options, text = self.options, self.options.work / "text"
        return Namespace(
            model=str(self.trained(model)),
            calibration=(text / "calibration.jsonl",),
            heldout=(text / "heldout.jsonl",),
            heldout_rows=options.heldout_rows,
            every=1,
            num_batches=options.num_batches,
            calibration_batches=None,
            batch_size=8,
            seq_len=min(512, options.row_length),
            recall=True,
            device=None,
            first_rows=None,
            methods=["auto"],
            sizes_for=options.repairs[-1],
            output=self.folder(model) / "runs",
        )

    def next_of(self, waiting: list[Step], running: list[str]) -> Step | None:
        """Return the first step that can be made, and is expected to end within this call."""
        trainings = sum(name.endswith(f"/{TRAINING}") for name in running)
        for step in waiting:
            if step.kind == TRAINING and trainings >= (len(self.devices) or 1):
                continue
            if all(path.exists() for path in step.needs) and self.expected(step) <= self.left_of_call:
                return step
        return None

    def expected(self, step: Step) -> float:
        """Return how long a step may take, by those of its kind; 0 where none was made yet.

        It is proportional to parameters and tokens at the most: a part of it is the same for all steps. A training
        can pause.
        """
        if step.kind == TRAINING:
            return PAUSING + min(SHORTEST, 60 * self.minutes_of(step.model))
        own = self.parameters(step.model) * step.amount
        return min((max(1.0, own / one) * seconds for one, seconds in self.took.get(step.kind, [])), default=0.0)

    def parameters(self, model: str) -> int:
        return read_json(self.trained(model) / "training.json")["parameters"]

    def seconds_file(self, step: Step) -> Path:
        """Return where it is written how long a step took."""
        return self.folder(step.model) / "seconds" / f"{slug(step.name)}.json"

    def learn(self, step: Step, seconds: float) -> None:
        self.took.setdefault(step.kind, []).append((self.parameters(step.model) * step.amount, seconds))

    def end(self, step: Step, ended: Ended) -> None:
        """Take note of a step that ended."""
        if step.path.exists():
            write_json(self.seconds_file(step), {"seconds": ended.seconds}, overwrite=True)
            self.learn(step, ended.seconds)
            print(f"{step.model}, {step.name}: {ended.seconds:.0f} s; {self.left / 60:.1f} minutes left", flush=True)
        elif step.kind == TRAINING and ended.failure is None:
            print(f"{step.model}: its training resumes in the next call", flush=True)
        else:
            self.leave_out(step.model, step.name, ended.failure or "it failed; the log says why")
        self.keep_time()
        self.report(step.model)

    def tell_missing(self, steps: list[Step]) -> None:
        """Say what was not made, and whether it will be."""
        for step in steps:
            if step.name in self.left_out.get(step.model, ()):
                continue
            if not all(path.exists() for path in step.needs):
                self.leave_out(step.model, step.name, "what it begins with was not made")
            elif self.left <= (expected := self.expected(step)):
                self.leave_out(
                    step.model, step.name, f"it takes {expected:.0f} s, and {max(self.left, 0):.0f} s are left"
                )
            else:
                self.leave_out(step.model, step.name, "the time of this call was over")

    def report(self, model: str) -> None:
        """Write the file of a model."""
        found: dict[str, Any] = {"model": model, "config": read_json(self.configs[model])}
        training = self.trained(model) / "training.json"
        if training.exists():
            found["training"] = {name: value for name, value in read_json(training).items() if name != "arguments"}
            for text in ("text", "heldout_text"):
                found["training"][text].pop("roots", None)  # folders of one machine
            found |= {"calibration_tokens": self.options.num_batches * 8 * self.chosen(model).seq_len}
            for step in self.steps(model):
                if step.kind != TRAINING and step.path.exists():
                    content = read_json(step.path)
                    if step.name == "dense":
                        found["dense"] = {name: content[name] for name in ("perplexity", "recall")}
                    else:
                        found.setdefault("runs", []).append(content)
        found["left_out"] = self.left_out.get(model, {})
        found |= {
            "minutes": self.options.minutes,
            "options": chosen_options(self.options),
            "gpus": len(self.devices),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write_json(self.options.output / f"{model}.json", found, overwrite=True)


def train_until(command: list[str], folder: Path, end: float) -> None:
    """Train a model, or pause in time for a clock (`time.monotonic`) of ``end``; KeyreduceError says why it failed."""
    log = folder / f"training-{time.time():.0f}.log"
    pause = ["--pause-after", str((end - time.monotonic() - PAUSING) / 60)]
    (outcome,) = run_jobs([Job(folder.name, [*command, *pause], log, {"PYTHONPATH": modules()})])
    if outcome.code:
        raise KeyreduceError(outcome.message)
    model = folder / "training" / "model"
    if model.exists():
        shutil.rmtree(model.with_name("checkpoints"))  # several times the size of the model
    print(f"{folder.name}: {last_words(log, model.parent)}", flush=True)


def begin(chosen: Namespace) -> None:
    """Calibrate a dense model, and measure it."""
    calibration_file(chosen, 0)
    make_dense(chosen)


def measure_format(chosen: Namespace, folder: Path, before: Path, path: Path, run: dict) -> None:
    """Measure a model whose state is stored in a format; ``run`` says which, and is written too.

    ``before`` is the file of the same model with its state in float32.
    """
    rows = Namespace(**vars(chosen) | {"batch_size": min(32, chosen.heldout_rows)})
    sizes = {name: value for name, value in read_json(before).items() if name == "sizes"}
    run |= {"kind": None, "tokens": 0, **sizes}
    write_json(path, run | measure(rows, folder, run["state_dtype"]))


def chosen_options(options: Namespace) -> dict[str, Any]:
    """Return the options that are not their defaults, but for those that say where things are and when to pause."""
    elsewhere = {"output", "work", "table", "minutes", "pause_after", "installed"}
    default = vars(parse_arguments(["--output", ""]))
    return {name: value for name, value in vars(options).items() if name not in elsewhere and value != default[name]}


def last_words(log: Path, folder: Path) -> str:
    """Return the last line that a training says of its folder; libraries may warn of something after it."""
    lines = log.read_text().splitlines()
    return next((line for line in reversed(lines) if line.startswith(str(folder))), "trained")


def recipe_of(model: str) -> Recipe:
    """Return how a model is trained; one that has no recipe as the large ones are."""
    return MODELS.get(model, Recipe())


def config_named(name: str) -> Path:
    """Return the config of a model by its name, or by the path of the file."""
    path = CONFIGS / f"{name}.json" if name in MODELS else Path(name)
    if not path.is_file():
        sys.exit(f"there is no model {name}; --models takes {', '.join(MODELS)}, or paths of configs")
    return path


def modules() -> str:
    """Return where a training finds keyreduce and its backend, without an install too."""
    return os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "flash-linear-attention"), os.environ.get("PYTHONPATH")])
    )


if __name__ == "__main__":
    main()

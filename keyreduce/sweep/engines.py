"""What runs the processes of a sweep: this machine, or a Ray cluster."""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from keyreduce.errors import KeyreduceError, reason
from keyreduce.jobs import Job, Outcome, gpus, run_jobs

ENGINES = ("processes", "ray")


def engine_named(name: str, *, jobs: int | None, device: str) -> tuple[Callable[[Sequence[Job]], list[Outcome]], int]:
    """Return an engine, and how many processes it runs at a time.

    Args:
        name: of `ENGINES`.
        jobs: how many processes at a time; None is one for each GPU where runs take any GPU, else one on this machine;
            on a cluster, as many as it has GPUs, or pairs of cores.
        device: what runs compute on. A GPU without a number is one that no other run has.

    Raises:
        KeyreduceError: there is no such engine, it is not installed, or no cluster answers.
    """
    if name not in ENGINES:
        raise KeyreduceError(f"`engine` {name} is unknown; take one of {', '.join(ENGINES)}")
    on_any_gpu = device == "cuda"
    if name == "ray":
        return _ray(jobs, on_any_gpu)
    devices = gpus() if on_any_gpu else []
    workers = jobs or len(devices) or 1
    return partial(run_jobs, workers=workers, devices=devices), workers


def _ray(jobs: int | None, on_any_gpu: bool) -> tuple[Callable[[Sequence[Job]], list[Outcome]], int]:
    if importlib.util.find_spec("ray") is None:
        raise KeyreduceError("`engine` ray needs Ray: pip install keyreduce[ray]")
    import ray

    try:
        # Where RAY_ADDRESS or a running cluster of this machine says where, there; else on this machine alone.
        ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, logging_level="error")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise KeyreduceError(f"Ray does not start: {reason(error)}") from error
    resources = ray.cluster_resources()
    if on_any_gpu:
        needs = {"num_cpus": 1, "num_gpus": 1}
        workers = jobs or int(resources.get("GPU", 0))
        if not workers:
            raise KeyreduceError("the Ray cluster has no GPU; give `device` cpu")
    else:
        workers = jobs or max(1, int(resources.get("CPU", 1)) // 2)
        needs = {"num_cpus": max(1, min(2, int(resources.get("CPU", 1)) // workers))}
    return partial(_run_on_ray, workers=workers, needs=needs), workers


def _run_on_ray(jobs: Sequence[Job], *, workers: int, needs: dict) -> list[Outcome]:
    """Run jobs as tasks of Ray, so many at a time; what a task cannot say for itself is the outcome of its job."""
    import ray

    # Modules are found where this process found them; on other machines keyreduce is installed.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
    task = ray.remote(_run_one).options(**needs, max_retries=0, runtime_env=environment)
    waiting, running, outcomes = list(jobs), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[task.remote(job)] = job
            (done, *_), _ = ray.wait(list(running))
            job = running.pop(done)
            try:
                outcomes[id(job)] = ray.get(done)
            except ray.exceptions.RayError as error:
                outcomes[id(job)] = Outcome(job, 1, 0.0, reason(error))
    finally:
        for reference in running:
            ray.cancel(reference)  # its KeyboardInterrupt ends the process too
    return [outcomes[id(job)] for job in jobs]


def _run_one(job: Job) -> Outcome:
    """Run a job where Ray has put this, with the Python that is there."""
    import dataclasses

    here = dataclasses.replace(job, argv=[sys.executable, *job.argv[1:]])
    return run_jobs([here], workers=1)[0]

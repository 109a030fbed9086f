"""What starts the processes of a sweep: this machine, or a Ray cluster."""

import dataclasses
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial

from keyreduce.api.tasks import Launch, on_this_machine
from keyreduce.errors import KeyreduceError, reason
from keyreduce.processes import Job, Outcome, run_jobs


def launcher_named(name: str, *, jobs: int | None, device: str) -> tuple[Launch, int]:
    """Return what runs processes, on this machine or on ``ray``, and how many it runs at a time.

    ``jobs`` says how many. None: see :func:`keyreduce.api.tasks.on_this_machine`, and on a cluster as many as it has
    GPUs, or pairs of cores. Where ``device`` is ``cuda``, each process gets a GPU of its own.

    Raises:
        KeyreduceError: Ray is not installed, or no cluster answers.
    """
    if name != "ray":
        return on_this_machine(device, jobs)
    if importlib.util.find_spec("ray") is None:
        raise KeyreduceError("`launcher` ray needs Ray: pip install keyreduce[ray]")
    import ray

    try:
        # On the cluster that RAY_ADDRESS names or that this machine is part of; without one, on this machine alone.
        ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise KeyreduceError(f"Ray does not start: {reason(error)}") from error
    resources = ray.cluster_resources()
    if device == "cuda":
        needs = {"num_cpus": 1, "num_gpus": 1}
        workers = jobs or int(resources.get("GPU", 0))
        if not workers:
            raise KeyreduceError("the Ray cluster has no GPU; set `device` to cpu")
    else:
        workers = jobs or max(1, int(resources.get("CPU", 1)) // 2)
        needs = {"num_cpus": max(1, min(2, int(resources.get("CPU", 1)) // workers))}
    return partial(_run_on_ray, workers=workers, needs=needs), workers


def _run_on_ray(jobs: Sequence[Job], *, workers: int, needs: dict) -> list[Outcome]:
    """Run jobs as Ray tasks, several at a time; where a task fails as such, its error is the outcome of its job."""
    import ray
    from ray.exceptions import RayError

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
            except RayError as error:
                outcomes[id(job)] = Outcome(job, 1, 0.0, reason(error))
    finally:
        for reference in running:
            ray.cancel(reference)  # its KeyboardInterrupt ends the process too
    return [outcomes[id(job)] for job in jobs]


def _run_one(job: Job) -> Outcome:
    """Run a job where Ray has put this task, with the Python that is there."""
    return run_jobs([dataclasses.replace(job, argv=[sys.executable, *job.argv[1:]])], workers=1)[0]

"""Test the oldest versions that pyproject.toml allows, and the pinned ones, each in an environment of its own.

    python tests/versions.py                  # both; what `make test-versions` runs
    python tests/versions.py oldest --keep    # one; an environment that is there is used again

An environment is first what ``pip install keyreduce`` gives, without any extra: all of the tests of ``PLAIN`` must pass
there. Then come the extras, and the tests of ``WITH_EXTRAS``. The versions are those of the lists in configs/.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTS = {"oldest": "constraints-oldest.txt", "newest": "constraints.txt"}
# Neither may be there where there are no extras.
EXTRA = ("accelerate", "peft", "lm_eval", "ray")
# Tests of families whose files are pruned, verified and converted, and the whole line of commands on hybrids.
PLAIN = ("tests/models/test_meta.py", "tests/cli/test_hybrids.py")
WITH_EXTRAS = (
    "tests/test_versions.py",
    "tests/families",
    "tests/models/test_replaced_operators.py",
    "tests/models/test_file_tensors.py",
    "tests/models/test_delta_net_2_checkpoint.py",
    "tests/calibration/test_capture.py",
    "tests/calibration/test_hybrid_sums.py",
    "tests/calibration/test_offload.py",
    "tests/flash-linear-attention/test_generation.py",
    "tests/flash-linear-attention/test_fla_models.py",
    "tests/flash-linear-attention/test_transformers_models.py",
    "tests/pruning/test_plain_transformers.py",
    "tests/pruning/test_hybrid_slices.py",
    "tests/benchmarking/test_benchmark_decode.py",
    "tests/recovery/test_train_hybrids.py",
    "tests/evaluation/test_harness.py",
    "tests/sweep/test_sweep_launchers.py",
    "tests/cli/test_main_line.py",
)


def test(name: str, folder: Path, *, keep: bool) -> None:
    """Build an environment and run its tests; raises CalledProcessError where anything fails."""
    python, started = folder / "bin" / "python", time.monotonic()

    def install(*what: str) -> None:
        pins = ("--constraint", ROOT / "configs" / LISTS[name])
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins, *what)

    def check(*tests: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        run(python, "-m", "pytest", "--numprocesses", os.environ.get("PROCESSES", "2"), *tests, env=environment)

    is_there = keep and python.exists()
    if not is_there:
        run(sys.executable, "-m", "venv", "--clear", folder)
        install("--editable", str(ROOT), "hypothesis", "pytest", "pytest-xdist")
        code = "import importlib.util as u, sys; sys.exit(', '.join(filter(u.find_spec, sys.argv[1:])) or None)"
        run(python, "-c", code, *EXTRA)
        check(*PLAIN)
        install("--editable", f"{ROOT}[harness,ray,train]", "hypothesis", "pytest", "pytest-xdist")
    check(*WITH_EXTRAS)
    print(f"{name}: all passed, {time.monotonic() - started:.0f} s", flush=True)


def run(*command: object, **options) -> None:
    """Run a command in the repository's root, and say which."""
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, **options)


def main() -> None:
    """Test what the command line names, by default both lists."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="|".join(LISTS), help="which list of versions; by default all")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="where the environments are made")
    parser.add_argument("--keep", action="store_true", help="use an environment that is there, with its extras")
    arguments = parser.parse_args()
    names = arguments.names or list(LISTS)
    if unknown := set(names) - LISTS.keys():
        parser.error(f"there is no list {min(unknown)!r}; take {' or '.join(LISTS)}")
    for name in names:
        try:
            test(name, arguments.folder / name, keep=arguments.keep)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name}: {error.cmd[0]} ended with code {error.returncode}")


if __name__ == "__main__":
    main()

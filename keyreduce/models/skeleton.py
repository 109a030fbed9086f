"""Which tensors a config.json asks for, and whether a checkpoint has them: the model is built without any numbers.

Building it takes fla, which takes seconds to import. So a program that reads and writes files alone lets a child
process import it meanwhile, and asks at the end.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from keyreduce.errors import KeyreduceError, reason
from keyreduce.models.hollow import make_hollow

_LISTED = 10
_PATIENCE_S = 120
# Collecting garbage costs a sixth of the time that the imports take, and they leave next to none.
_CHILD = "import gc; gc.disable(); from keyreduce.models.skeleton import answer; answer(hollow={hollow})"
# What libraries import with the classes of layers, for when these run or are compiled: half of the time and a fifth of
# the memory. The shapes of parameters do not come from there.
_HOLLOW = (
    "fla.modules.activations.ops",
    "fla.ops",
    "scipy.optimize",
    "torch._dynamo",
    "torch.distributed._tensor",
    "torch.distributed.tensor",
    "transformers.generation.continuous_batching",
)


class UnknownArchitecture(KeyreduceError):
    """Nothing can be said of this model: transformers has no such class, or renames tensors when it loads them."""


class Wanted(NamedTuple):
    """What a model's checkpoint holds.

    Attributes:
        shapes: tensor name -> shape.
        tied: groups of names that are one tensor in the model; a checkpoint needs one of each group.
        may_lack, may_have: regular expressions of names that the model's class forgives.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: list[list[str]]
    may_lack: list[str]
    may_have: list[str]


class Skeleton:
    """Builds models without numbers, in a child process unless this one has imported fla already.

    The child starts at once, imports, waits, answers once, and dies with the context.
    """

    def __init__(self):
        self._child = None if "fla" in sys.modules else _Child(hollow=True)

    def __enter__(self) -> "Skeleton":
        return self

    def __exit__(self, *_) -> None:
        if self._child is not None:
            self._child.close()

    def check(self, config: Mapping, shapes: Mapping[str, Sequence[int]], path: Path) -> None:
        """Refuse a checkpoint that does not hold what its config asks for; may be called once.

        Args:
            config: the content of config.json.
            shapes: tensor name -> shape, of the whole checkpoint.
            path: what to call it.

        Raises:
            UnknownArchitecture: nothing can be said of such a model; the checkpoint may be right.
            KeyreduceError: tensors are missing, left over or of another shape, no model is made from the config, or
                the child failed.
        """
        _refuse_more_layers(config, len(shapes), path)
        if self._child is None:
            _check(describe, config, shapes, path)
            return
        try:
            _check(self._child.ask, config, shapes, path)
        except UnknownArchitecture:
            raise
        except KeyreduceError:
            # Nobody promises that a model of another version can be built beside hollow modules: ask without them.
            self._child.close()
            self._child = _Child(hollow=False)
            _check(self._child.ask, config, shapes, path)


class _Child:
    def __init__(self, *, hollow: bool):
        # Modules are found where this process found them, and not in the current folder. What torch.compile makes of
        # fla's functions is never run here, and getting it ready takes a second.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONSAFEPATH": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._complaints = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(hollow=hollow)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child
        )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def ask(self, config: Mapping) -> Wanted:
        """Return what :func:`describe` returns, or raise what it raises."""
        try:
            out, _ = self._process.communicate(json.dumps(config).encode(), timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise KeyreduceError(
                f"building the model of config.json took more than {_PATIENCE_S} s; are its sizes right?"
            ) from None
        if self._process.returncode != 0 or not out:
            self._complaints.seek(0)
            lines = self._complaints.read().decode(errors="replace").strip().splitlines()
            raise KeyreduceError(
                "the process that builds the model to check against died "
                f"({lines[-1] if lines else f'exit code {self._process.returncode}'})"
            )
        found = json.loads(out)
        if "error" in found:
            raise (UnknownArchitecture if found["unknown"] else KeyreduceError)(found["error"])
        return Wanted({name: tuple(shape) for name, shape in found.pop("shapes").items()}, **found)


def _check(describe: Callable[[Mapping], Wanted], config: Mapping, shapes: Mapping, path: Path) -> None:
    try:
        wanted = describe(config)
    except UnknownArchitecture:
        raise
    except KeyreduceError as error:
        raise KeyreduceError(f"{path}: {error}") from None
    _compare(wanted, shapes, path)


def start_skeleton() -> Skeleton:
    """Start what will check a checkpoint, early, so that it is ready when it is asked; a context manager."""
    return Skeleton()


def check_tensors(config: Mapping, shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    """Refuse a checkpoint that does not hold what its config asks for; see :meth:`Skeleton.check`."""
    with start_skeleton() as skeleton:
        skeleton.check(config, shapes, path)


def describe(config: Mapping) -> Wanted:
    """Build the model of a config on torch's meta device, in this process, and say what it holds.

    Raises:
        UnknownArchitecture: transformers has no such model, or its tensors have other names in files.
        KeyreduceError: no model is made from the config.
    """
    import fla_torch  # noqa: F401  (before fla, which warns where there is no GPU: this silences it)
    import torch
    import transformers

    import keyreduce.models.delta_net_2  # noqa: F401  (registers itself, and fla's models)

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise UnknownArchitecture(f"transformers knows no model_type {model_type!r}")
    if _renames(model_type):
        raise UnknownArchitecture(f"transformers renames tensors of model_type {model_type!r} when it loads them")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        their_config = transformers.AutoConfig.for_model(**config)
        if type(their_config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise UnknownArchitecture(f"transformers has no language model of model_type {model_type!r}")
        their_class = transformers.AutoModelForCausalLM._model_mapping[type(their_config)]
        if not isinstance(their_config, their_class.config_class):
            raise UnknownArchitecture(f"transformers loads but a part of model_type {model_type!r} as a language model")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(their_config)
    except KeyreduceError:
        raise
    except Exception as error:
        # A config that no model would have makes its constructor raise nearly anything.
        raise KeyreduceError(f"no model is made from its config.json: {reason(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    names_of: dict[int, list[str]] = {}
    for name, value in state.items():
        names_of.setdefault(id(value), []).append(name)
    return Wanted(
        {name: tuple(value.shape) for name, value in state.items()},
        [names for names in names_of.values() if len(names) > 1],
        sorted(model._keys_to_ignore_on_load_missing or ()),
        sorted(model._keys_to_ignore_on_load_unexpected or ()),
    )


def answer(*, hollow: bool) -> None:
    """The child's part: read a config from stdin, and write as JSON what a model of it holds, or why there is none.

    Args:
        hollow: whether to import placeholders for modules that the answer does not depend on.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not part of the answer
    if hollow:
        make_hollow(*_HOLLOW)
    import fla_torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401  (imported lazily otherwise, when the model is built)

    import keyreduce.models.delta_net_2  # noqa: F401

    text = sys.stdin.read()
    if not text:
        return  # the parent has gone
    try:
        found = describe(json.loads(text))._asdict()
    except KeyreduceError as error:
        found = {"error": str(error), "unknown": isinstance(error, UnknownArchitecture)}
    json.dump(found, out)
    out.flush()
    os._exit(0)  # taking all those modules apart takes a while


def _renames(model_type: str) -> bool:
    from transformers import conversion_mapping

    return bool(conversion_mapping.get_checkpoint_conversion_mapping(model_type))


def _refuse_more_layers(config: Mapping, count: int, path: Path) -> None:
    """A layer has a tensor at least, and to build a billion of them would take for ever."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _refuse_more_layers(value, count, path)
        elif "layer" in str(name) and isinstance(value, int | float) and value > max(count, 1):
            raise KeyreduceError(f"{path}: config.json says {name} {value:g}, and there are {count} tensors in all")


def _compare(wanted: Wanted, shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    def forgiven(name: str, patterns: list[str]) -> bool:
        return any(re.search(pattern, name) for pattern in patterns)

    there_as_another = {name for group in wanted.tied if any(other in shapes for other in group) for name in group}
    faults = {
        "missing": [
            name
            for name in wanted.shapes
            if name not in shapes and name not in there_as_another and not forgiven(name, wanted.may_lack)
        ],
        "left over": [name for name in shapes if name not in wanted.shapes and not forgiven(name, wanted.may_have)],
        "of another shape": [
            f"{name} {list(shapes[name])} for {list(shape)}"
            for name, shape in wanted.shapes.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    }
    told = [
        f"{what}: {', '.join(names[:_LISTED])}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for what, names in faults.items()
        if names
    ]
    if told:
        raise KeyreduceError(f"the tensors of {path} are not those that its config.json asks for; {'; '.join(told)}")

"""What keyreduce knows: its pruning methods, and the architectures that it can prune."""

from dataclasses import dataclass

from keyreduce.api.request import Request, Result, specs
from keyreduce.errors import KeyreduceError
from keyreduce.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class MethodsRequest(Request):
    """List the pruning methods: what each needs, what it can cut, its options and its paper.

    Methods of other packages that are installed are among them.
    """


@dataclass(frozen=True, kw_only=True)
class MethodsResult(Result):
    """The pruning methods.

    Attributes:
        methods: for each its ``name``, a ``summary``, what it ``needs`` ("nothing", "statistics", or "statistics with
            gradients"), what it can cut (``targets``), and its ``paper``; ``options`` are its own, each with its
            ``name``, its ``default`` and a ``help``, which is empty for those of other packages.
    """

    methods: list[dict]


@dataclass(frozen=True, kw_only=True)
class FamiliesRequest(Request):
    """List the architectures that keyreduce prunes: the rule of the state, the library that runs it, and its paper.

    A model is known by the model_type of its config.json, or of the text_config in there.
    """


@dataclass(frozen=True, kw_only=True)
class FamiliesResult(Result):
    """The architectures.

    Attributes:
        families: for each its ``model_type``, the ``rule`` by which its state is written, the library that has the
            model's class (``needs``), the ``paper`` of the rule, and the larger models ``within`` which it is known.
        refused: model types of the same kin -> why they cannot be pruned.
    """

    families: list[dict]
    refused: dict[str, str]


def methods(request: MethodsRequest, reporter: Reporter = Reporter()) -> MethodsResult:
    """Return the methods, ours first; one of another package that does not load is reported and left out."""
    from keyreduce.pruning.methods import METHODS, method_named, registered_elsewhere

    found = []
    for name in (*METHODS, *registered_elsewhere()):
        try:
            method = method_named(name)
        except KeyreduceError as error:
            reporter.note(str(error))
            continue
        needs = "statistics" if method.needs_statistics else "nothing"
        options = [
            {"name": option, "default": default, "help": _help_of(option) if name in METHODS else ""}
            for option, default in method.options.items()
        ]
        found.append(
            {
                "name": name,
                "summary": method.summary,
                "needs": "statistics with gradients" if method.needs_gradients else needs,
                "targets": [*method.select],
                "paper": method.citation,
                "options": options,
            }
        )
    return MethodsResult(methods=found)


def families(request: FamiliesRequest, reporter: Reporter = Reporter()) -> FamiliesResult:
    """Return the architectures, and those that are refused."""
    from keyreduce.families import LANGUAGE_MODELS, REFUSED, WRAPPERS

    found = [
        {
            "model_type": name,
            "rule": family.rule,
            "needs": family.shipped_by,
            "paper": family.paper,
            "within": [wrapper for wrapper, inner in WRAPPERS.items() if inner is family],
        }
        for name, family in LANGUAGE_MODELS.items()
    ]
    return FamiliesResult(families=found, refused=REFUSED)


def _help_of(option: str) -> str:
    """Return what the flag of keyreduce prune says of a method's option."""
    from keyreduce.api.prune import PruneRequest

    field = specs(PruneRequest).get(option)
    return field.option.help.partition(": ")[2] if field else ""

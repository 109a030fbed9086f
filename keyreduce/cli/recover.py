"""``keyreduce recover``: a pruned model and text to the same model with some of its quality won back."""

from keyreduce.api import recover
from keyreduce.cli.console import Console

_COLUMNS = {
    "before": "missing_before",
    "after least squares": "missing_after",
    "after reconstruct": "missing_reconstructed",
    "error, first steps": "error_first",
    "last steps": "error_last",
}


def show(request: recover.RecoverRequest, console: Console) -> None:
    """Recover, and print what was reached."""
    result = recover.run(request, console)
    if result is None:
        return
    if result.made:
        _show_made(result, console)
    if result.perplexity:
        base, first = next(iter(result.perplexity.items()))
        rows = [(label, f"{value:.4f}", f"{value / first - 1:+.1%}") for label, value in result.perplexity.items()]
        console.table("held-out text", ("", "perplexity per token", f"over {base}"), rows)
    console.finish(result)


def _show_made(result: recover.RecoverResult, console: Console) -> None:
    spent = f"{result.tokens:,} tokens"
    if result.layers is None:
        how = f"{result.mode}, with teacher {result.teacher.name}" if result.teacher else result.mode
        losses = f"loss {result.loss_first:.4f} -> {result.loss_last:.4f} nats per token"
        if result.passes and result.passes > 1:
            console.note(f"the training went through the text {result.passes} times")
        console.say(f"{how}: {spent} in {result.seconds:.0f} s, {losses}")
        console.say(f"wrote {result.recovered}, with training.png")
        return
    figures = next(iter(result.layers.values()), {})
    columns = {title: name for title, name in _COLUMNS.items() if name in figures}
    console.table(
        f"{result.mode}, {spent}, {result.seconds:.0f} s: missing of the dense mixer's output",
        ("layer", *columns),
        [(layer, *(f"{one[name]:.2%}" for name in columns.values())) for layer, one in result.layers.items()],
    )
    console.say(f"wrote {result.recovered}")

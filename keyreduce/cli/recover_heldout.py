"""What a repair has won, on text that it has not seen."""


def measure(console, result: dict, heldout, device) -> dict[str, float]:
    """Print and return the perplexity per token of the dense, the pruned and the repaired model.

    Args:
        console: where to print.
        result: where they lie, by these names; of a model that does not say what it was pruned from, dense is None.
        heldout: a TextSource.
        device: where to run.

    Raises:
        KeyreduceError: a model does not load, or the text is empty.
    """
    import torch

    from keyreduce.checkpoint.find import find_model
    from keyreduce.evaluation.perplexity import evaluate
    from keyreduce.models.loading import load_model

    found = {}
    for label in ("dense", "pruned", "recovered"):
        if result[label] is not None:
            loaded = load_model(find_model(result[label]), device, torch.float32, gradients=True)
            cost, _ = evaluate(loaded, heldout, seq_len=1024, batch_size=4, num_rows=None)
            found[label] = cost.perplexity
    base, first = next(iter(found.items()))
    rows = [(label, f"{value:.4f}", f"{100 * (value / first - 1):+.1f}%") for label, value in found.items()]
    console.table("held-out text", ("", "perplexity per token", f"over {base}"), rows)
    return found

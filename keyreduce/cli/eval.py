"""``keyreduce eval``: dense against pruned, in quality."""

from typing import Annotated

import typer

from keyreduce.cli import eval_base, eval_tasks, options

_RECALL = "Recall"


def evaluate(
    context: typer.Context,
    model: options.DenseModel = None,
    compressed: options.Compressed = None,
    work: options.Work = options.DEFAULT_WORK,
    text: options.Text = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = None,
    num_batches: options.MeasuredBatches = 8,
    batch_size: options.BatchSize = 4,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 1024,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens from one row's start to the next one's; only the last N of a row are scored.",
            show_default="as far as can be: no overlap",
        ),
    ] = None,
    by_document: Annotated[
        bool,
        typer.Option(
            "--by-document",
            help="Score each document on its own and all of it, as lm-evaluation-harness does; else all are joined.",
        ),
    ] = False,
    recall: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            rich_help_panel=_RECALL,
            help="Measure recall too: mqar (multi-query associative recall), needle (in a haystack of the text), "
            "or mqar,needle.",
        ),
    ] = None,
    recall_lengths: Annotated[
        str, typer.Option(metavar="T,...", rich_help_panel=_RECALL, help="Tokens in a sequence.")
    ] = "256,1024",
    recall_pairs: Annotated[
        str, typer.Option(metavar="N,...", rich_help_panel=_RECALL, help="Keys with a value in a sequence.")
    ] = "1,4,16,64",
    recall_probes: Annotated[
        int, typer.Option(min=1, rich_help_panel=_RECALL, help="Sequences for each length and number of pairs.")
    ] = 16,
    tasks: eval_tasks.Tasks = None,
    include_path: eval_tasks.IncludePath = None,
    num_fewshot: eval_tasks.NumFewshot = None,
    limit: eval_tasks.Limit = None,
    base: eval_base.Base = None,
    jobs: eval_base.Jobs = None,
    output: options.Figures = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure held-out perplexity, and recall, of the dense and of the pruned model.

    Text is taken in its own order: --seed draws what --recall asks, and nothing else.

    Under torchrun the batches are shared out, and the figures stay the same.
    """
    from keyreduce.api.pair import load_pair
    from keyreduce.cli.console import Console
    from keyreduce.cli.eval_recall import recall_settings, show_recall, tell_left_out
    from keyreduce.data.text import text_source
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.evaluation.perplexity import check_lengths, text_costs, total
    from keyreduce.evaluation.recall import RecallProbes, recall_figures
    from keyreduce.outputs import refuse_existing, refuse_unwritable, write_json
    from keyreduce.processes import Processes
    from keyreduce.workspace import Workspace

    console, workspace, processes = Console(as_json=json), Workspace(work), Processes.of_torchrun()
    console.errors.quiet = console.tables.quiet = processes.rank > 0
    target = output or workspace.evaluation
    num_rows = num_batches * batch_size or None

    base = eval_base.chosen_base(context, base)
    if base is not None:
        refuse_existing(output, overwrite)
        refuse_unwritable(target, folder=False)
        if tasks:
            eval_tasks.find(tasks, include_path)
        source = text_source(text or (), dataset, dataset_config, split, default="heldout")
        return eval_base.evaluate_base(
            console,
            context,
            base,
            model=model,
            text=source,
            workspace=workspace,
            output=target,
            device=device,
            jobs=jobs,
            again=overwrite,
        )

    def measure() -> dict:
        """Do what is this process's share: everything that can fail but writing the report."""
        refuse_existing(output, overwrite)
        refuse_unwritable(target, folder=False)
        check_lengths(seq_len, stride, by_document=by_document)
        asked = recall and recall_settings(recall, recall_lengths, recall_pairs, recall_probes, seed)
        found_tasks = eval_tasks.find(tasks, include_path) if tasks else None
        source = text_source(text or (), dataset, dataset_config, split, default="heldout")
        on = pick_device(processes.device(device))
        found = {"text": source.describe(), "recall": asked and asked.describe(), "models": []}
        models = load_pair(console, model, compressed, workspace, on, pick_dtype(dtype, on), each=True, unrelated=False)
        for label, loaded in models.items():
            tokens = (num_rows or 0) * seq_len // processes.number or None
            with console.progress(f"measuring {label}", tokens, "tokens") as progress:
                rows = text_costs(
                    loaded,
                    source,
                    seq_len=seq_len,
                    stride=stride,
                    by_document=by_document,
                    batch_size=batch_size,
                    num_rows=num_rows,
                    processes=processes,
                    progress=progress,
                )
            entry = {"label": label, "folder": str(loaded.folder), "rows": rows}
            if asked:
                probes = RecallProbes(loaded, source, asked)
                if not found["models"]:
                    tell_left_out(console, probes.left_out)
                with console.progress(f"asking {label}", probes.tokens // processes.number, "tokens") as progress:
                    entry["recall"] = probes.ask(batch_size=batch_size, processes=processes, progress=progress)
            if found_tasks:
                entry |= eval_tasks.run(
                    console,
                    label,
                    loaded,
                    found_tasks,
                    target,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    batch_size=batch_size,
                )
            found["models"].append(entry)
        return found

    shares = processes.gather(measure)
    if processes.rank:
        return
    report = {
        "text": shares[0]["text"],
        "seq_len": seq_len,
        "stride": check_lengths(seq_len, stride, by_document=by_document),
        "by_document": by_document,
        "models": [],
    }
    if shares[0]["recall"]:
        report["recall"] = shares[0]["recall"]
    for parts in zip(*(share["models"] for share in shares), strict=True):
        cost = total(row for part in parts for row in part["rows"])
        if cost.predictions < seq_len - 1 and not by_document:
            console.note(f"the text is shorter than one sequence: {cost.predictions + 1} tokens instead of {seq_len}")
        entry = {"label": parts[0]["label"], "folder": parts[0]["folder"], **cost.figures()}
        if "recall" in parts[0]:
            entry["recall"] = recall_figures(part["recall"] for part in parts)
        entry |= {name: parts[0][name] for name in ("tasks", "tasks_file") if name in parts[0]}
        report["models"].append(entry)
    _compare(report["models"])
    write_json(target, report, overwrite=True)
    _show_perplexity(console, report)
    if "recall" in report:
        show_recall(console, report["models"])
    if tasks:
        eval_tasks.show(console, report["models"])
    console.say(f"wrote {target}")
    console.result(report)


def _compare(entries: list[dict]) -> None:
    dense = entries[0]["perplexity_per_token"]
    for entry in entries[1:]:
        cost = entry["perplexity_per_token"]
        entry["perplexity_increase"] = cost / dense - 1 if cost and dense else None


def _told(figure: float) -> str:
    return f"{figure:.4f}" if figure < 1e6 else f"{figure:.3e}"


def _show_perplexity(console, report: dict) -> None:
    names = ("perplexity_per_token", "perplexity_per_word", "bits_per_byte")
    rows = []
    for entry in report["models"]:
        row = [entry["label"]]
        row += ["" if entry[name] is None else _told(entry[name]) for name in names]
        increase = entry.get("perplexity_increase")
        rows.append([*row, "" if increase is None else f"{increase:+.1%}"])
    how = f", one every {report['stride']}" if report["stride"] < report["seq_len"] else ""
    how += ", each document on its own" if report["by_document"] else ""
    console.table(
        f"{report['models'][0]['predictions']:,} predictions in rows of {report['seq_len']} tokens{how}",
        ("", *(name.replace("_", " ") for name in names), "perplexity over dense"),
        rows,
    )

"""Train a small model from a config, as the shipped models were: the README beside this file says how they were.

    PYTHONPATH=.:flash-linear-attention python flame/pretrain.py \\
        --config configs/pretrain/delta-net-5m.json --output runs/delta-net-5m

``OUTPUT/model`` appears when training ends: a plain Hugging Face folder in bfloat16, with ``training.json``. The same
command again, after an interruption, resumes from the last of ``OUTPUT/checkpoints``. Under ``torchrun`` the same
global batch is divided among the processes.

Shapes: V token ids.
"""

import argparse
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from corpus import Corpus, RandomWindows, open_corpus, write_corpus
from schedule import InTime, TimeSchedule
from training import ByteTrainer, build_model, measure, training_arguments
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed

from keyreduce.data.batches import bytes_per_token, token_rows
from keyreduce.data.installed import InstalledText
from keyreduce.data.text import Split, TextSource, text_source
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity
from keyreduce.outputs import appearing, read_json, write_json

VERSIONS = ("torch", "transformers", "accelerate", "flash-linear-attention", "triton")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", type=Path, required=True, help="a model config, as in configs/pretrain and configs/scale")
    add("--output", type=Path, required=True, help="the folder for checkpoints and, at the end, the model")
    add("--text", type=Path, action="append", default=[], help="file or folder to train on (default: Python's source)")
    add("--heldout-text", type=Path, action="append", default=[], help="file or folder to measure on (likewise)")
    add("--installed", nargs="*", type=Path, metavar="FOLDER", help="text instead: that of all installed packages")
    add("--tokenizer", choices=["bytes", "bpe"], default="bytes", help="bpe: trained on the text, for the config")
    add("--data", type=Path, help="the folder of tokenizer and tokens, made unless it is there (default: in --output)")
    add("--text-only", action="store_true", help="make tokenizer and tokens in --data, and end")
    add("--steps", type=int, help="3000 by default")
    add("--minutes", type=float, help="train for so long instead; the learning rate follows the time")
    add("--pause-after", type=float, metavar="MINUTES", help="save and end then; the same command resumes")
    add("--batch-size", type=int, default=64, help="rows a step, of all processes together")
    add("--micro-batch", type=int, help="rows that a device takes at a time (default: its share of --batch-size)")
    add("--seq-len", type=int, default=1024, help="tokens a row")
    add("--learning-rate", type=float, default=2e-3, help="the highest, after warm-up; it falls to zero as a cosine")
    add("--warmup", type=int, default=100, help="steps")
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--heldout-rows", type=int, help="measure on so many rows only")
    add("--log-every", type=int, default=50, help="steps")
    add("--evaluate-every", type=int, default=500, help="steps")
    add("--save-every", type=int, default=500, help="steps")
    add("--kernels", choices=["torch", "fla"], default="torch", help="PyTorch, or on CUDA fla's own Triton")
    add("--residual", choices=["float32", "bfloat16"], default="float32", help="what layers add to, on CUDA")
    add("--shard", action="store_true", help="FSDP instead of DDP under torchrun")
    args = parser.parse_args(arguments)
    if args.steps is not None and args.minutes is not None:
        parser.error("--steps and --minutes both say when to end: give one of them")
    if args.installed is not None and (args.text or args.heldout_text):
        parser.error("--installed is text to train on and to measure on: leave out --text and --heldout-text")
    args.steps = 3000 if args.steps is None and args.minutes is None else args.steps
    return args


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint; ``trainer_state.json`` is what Trainer writes last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    return str(newest) if newest else None


def choose_kernels(args: argparse.Namespace, config: dict, device: torch.device) -> None:
    """Let fla's models run on a device in the kernels that were asked for; the rule in PyTorch where Triton errs."""
    import fla_torch

    if args.kernels == "torch" or device.type == "cpu":
        fla_torch.enable(cuda=device.type != "cpu")
        return
    from keyreduce.families import family_of
    from keyreduce.models.miscompiled import has_wrong_gated_gradients, refuse_wrong_gradients
    from keyreduce.models.tuning import tune_few_variants

    family = family_of(config)
    fla_torch.mend()
    if has_wrong_gated_gradients(family, device):
        print("fla's gated rule has wrong gradients with this Triton and GPU: that rule runs in PyTorch", flush=True)
        fla_torch.enable(cuda=("gated_delta_rule",))
    else:
        refuse_wrong_gradients(family, config, device, "; or take --kernels torch")
    tune_few_variants()


def make_texts(args: argparse.Namespace) -> dict[str, TextSource]:
    """Return the text of each use: split by file, where it is of this machine."""
    splits: tuple[Split, ...] = ("train", "heldout", "calibration")
    if args.installed is not None:
        return {split: InstalledText(split, args.installed or None) for split in splits}
    given = {"train": args.text, "heldout": args.heldout_text}
    uses = splits if not any(given.values()) else splits[:2]
    return {use: text_source(given.get(use, ()), default=use) for use in uses}


def write_texts(args: argparse.Namespace, config: dict) -> None:
    """Make the tokens and the tokenizer, unless they are there."""
    folder = args.data or args.output / "data"
    write_corpus(folder, make_texts(args), config["vocab_size"] if args.tokenizer == "bpe" else None)


def make_corpus(args: argparse.Namespace, settings: TrainingArguments, config: dict) -> Corpus:
    """Return the tokens and the tokenizer, which the first process makes unless they are there."""
    with settings.main_process_first(local=False, desc="the tokens"):
        if settings.process_index == 0:
            write_texts(args, config)
    corpus = open_corpus(args.data or args.output / "data")
    separator, most = corpus.tokenizer.eos_token_id, max(corpus.tokenizer.get_vocab().values())
    if most >= config["vocab_size"] or config.get("eos_token_id") != separator:
        raise KeyreduceError(
            f"{args.config} is for another tokenizer: this one has ids up to {most} and {separator} between documents"
        )
    return corpus


def save(model: PreTrainedModel, tokenizer, folder: Path, record: dict) -> None:
    """Write a model, its tokenizer and the record; ``folder`` appears whole or not at all."""
    with appearing(folder, folder=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "training.json", record)


def main(args: argparse.Namespace) -> None:
    began = time.monotonic()
    model_folder = args.output / "model"
    if model_folder.exists():
        raise KeyreduceError(f"{model_folder} exists, so this training is done; give another --output")
    config = read_json(args.config)
    if args.text_only:
        write_texts(args, config)
        return
    recipe = {
        **vars(args),
        "config": config,
        **{name: [str(path) for path in getattr(args, name) or ()] for name in ("text", "heldout_text")},
        "installed": None if args.installed is None else [str(path) for path in args.installed],
    }
    for name in ("output", "data", "pause_after", "micro_batch", "text_only"):
        del recipe[name]
    recipe_file = args.output / "arguments.json"
    checkpoint = last_checkpoint(args.output / "checkpoints")
    if checkpoint and read_json(recipe_file) != recipe:
        raise KeyreduceError(f"{args.output} holds a training with other arguments; give another --output")

    import fla  # noqa: F401  (AutoConfig learns fla's model types)

    settings = training_arguments(args)
    choose_kernels(args, config, settings.device)
    if settings.process_index == 0:
        write_json(recipe_file, recipe, overwrite=True)
    corpus = make_corpus(args, settings, config)
    heldout_rows = token_rows(corpus.heldout.in_pieces(), corpus.tokenizer, args.seq_len)
    heldout_rows = list(islice(heldout_rows, args.heldout_rows))
    windows = RandomWindows(corpus.tokens_N, args.seq_len, settings.max_steps * args.batch_size, args.seed)
    schedule = None if args.minutes is None else TimeSchedule(60 * args.minutes, args.warmup)
    timing = InTime(schedule, None if args.pause_after is None else began + 60 * args.pause_after)

    set_seed(args.seed)
    bytes_V = bytes_per_token(corpus.tokenizer)
    tokens_per_step = args.batch_size * args.seq_len
    trainer = ByteTrainer(
        model=build_model(args, settings),
        args=settings,
        train_dataset=windows,
        heldout_rows=heldout_rows,
        bytes_V=bytes_V,
        tokens_per_step=tokens_per_step,
        schedule=schedule,
        callbacks=[timing],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if timing.is_paused:
        if settings.process_index == 0:
            print(f"{args.output}: paused at step {trainer.state.global_step}; the same command resumes")
        leave_processes()
        return
    # What ships is bfloat16, so that is what is measured last.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if settings.process_index == 0:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config))
        model.load_state_dict(weights)
        model = model.to(settings.device, torch.bfloat16).eval()
        heldout = measure(model, heldout_rows, settings, bytes_V)
        record = describe(trainer, recipe, corpus, model.num_parameters(), heldout)
        save(model, corpus.tokenizer, model_folder, record)
        print(f"{model_folder}: {heldout.bits_per_byte:.3f} bits per byte, held-out")
    leave_processes()


def describe(trainer: ByteTrainer, recipe: dict, corpus: Corpus, parameters: int, heldout: Perplexity) -> dict:
    """Return the record of a training."""
    windows = trainer.train_dataset
    assert isinstance(windows, RandomWindows)
    history, steps = trainer.state.log_history, trainer.state.global_step
    speeds = sorted(entry["tokens_per_second"] for entry in history[1:] if "tokens_per_second" in entry)
    texts = corpus.record["inputs"]["texts"]
    return {
        "arguments": recipe,
        "parameters": parameters,
        "text": texts["train"],
        "text_tokens": len(corpus.tokens_N),
        "steps": steps,
        "tokens_seen": steps * trainer.tokens_per_step,
        "passes": round(steps * recipe["batch_size"] / windows.rows_per_pass, 2),
        "seconds": history[-1]["seconds"],
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "train_bits_per_token": next(e["loss"] for e in reversed(history) if "loss" in e) / math.log(2),
        "heldout_text": texts["heldout"],
        "heldout_rows": len(trainer.eval_dataset),
        "heldout_bits_per_byte": heldout.bits_per_byte,
        "heldout_perplexity": heldout.perplexity,
        "heldout_bits_per_byte_at_step": {
            entry["step"]: entry["heldout_bits_per_byte"] for entry in history if "heldout_bits_per_byte" in entry
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": trainer.args.world_size,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
    }


def leave_processes() -> None:
    """End this process of several, when all of them are done."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # Not by way of destructors: that of gloo's process group waits for its threads while it holds the GIL, for
        # which one of those threads may be waiting to let go of a tensor (seen with torch 2.13).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except KeyreduceError as error:
        sys.exit(f"error: {error}")

"""Train a small model from a config, as the shipped models were: the README beside this file says how they were.

    PYTHONPATH=.:flash-linear-attention python flame/pretrain.py \\
        --config configs/pretrain/delta-net-5m.json --output runs/delta-net-5m

``OUTPUT/model`` appears when training ends: a plain Hugging Face folder in bfloat16, with ``training.json``. The same
command again, after an interruption, goes on from the last of ``OUTPUT/checkpoints``. Under ``torchrun`` the same
global batch is divided among the processes.

Shapes: T tokens in a row, N tokens of text, V token ids.
"""

import argparse
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from keyreduce.data.batches import batches, bytes_per_token, document_tokens, token_rows
from keyreduce.data.text import text_source
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import measure_rows
from keyreduce.outputs import appearing, read_json, write_json


class RandomWindows(torch.utils.data.Dataset):
    """Rows of T tokens from one long text, as many as the training takes.

    Each pass over the text starts its windows at another random offset and visits them in another random order, so each
    token is seen once a pass. Row i depends on the seed and on i alone: a resumed run sees the rows of an unbroken one.
    """

    def __init__(self, tokens_N: torch.Tensor, row_length: int, num_rows: int, seed: int):
        self.tokens_N, self.row_length, self.num_rows, self.seed = tokens_N, row_length, num_rows, seed
        # One row less than fits, so that every offset leaves room for the last window.
        self.rows_per_pass = len(tokens_N) // row_length - 1
        if self.rows_per_pass < 1:
            raise KeyreduceError(
                f"the text has {len(tokens_N)} tokens, fewer than two rows of {row_length}; "
                "give more text, or a smaller --seq-len"
            )
        self._pass = (-1, 0, torch.empty(0))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, place = divmod(index, self.rows_per_pass)
        if self._pass[0] != number:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            offset = int(torch.randint(self.row_length, (), generator=generator))
            self._pass = (number, offset, torch.randperm(self.rows_per_pass, generator=generator))
        _, offset, order = self._pass
        start = offset + int(order[place]) * self.row_length
        tokens_T = self.tokens_N[start : start + self.row_length]
        return {"input_ids": tokens_T, "labels": tokens_T}


class ByteTrainer(Trainer):
    """`Trainer` that measures bits per byte of held-out rows, and logs tokens a second."""

    def __init__(self, *, heldout_rows: list[torch.Tensor], bytes_V: torch.Tensor, tokens_per_step: int, **kwargs):
        super().__init__(eval_dataset=heldout_rows, **kwargs)
        # fla's models take any keyword, by which Trainer believes that they divide the loss by `num_items_in_batch`.
        # They return the mean, which is what Trainer assumes of a model that does not.
        self.model_accepts_loss_kwargs = False
        self.bytes_V, self.tokens_per_step = bytes_V, tokens_per_step
        self.clock = time.monotonic()

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        exempt = {name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def evaluate(self, *_, **__) -> dict[str, float]:
        metrics = {"heldout_bits_per_byte": self.bits_per_byte(self.model)}
        self.log(metrics)
        return metrics

    def bits_per_byte(self, model: torch.nn.Module) -> float:
        """Measure ``model`` on the held-out rows, which the processes divide among themselves."""
        own_rows = self.eval_dataset[self.args.process_index :: self.args.world_size]
        own_batches = batches(own_rows, self.args.per_device_eval_batch_size)
        own = measure_rows(model.eval(), own_batches, self.bytes_V, name="the model in training")
        total = torch.tensor([own.nats, own.bytes], dtype=torch.float64, device=self.args.device)
        nats, num_bytes = self.accelerator.reduce(total, reduction="sum").tolist()
        return nats / math.log(2) / num_bytes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The log is saved with each checkpoint, so the seconds add up over interruptions.
        before = self.state.log_history[-1] if self.state.log_history else {"seconds": 0.0, "step": 0}
        now = time.monotonic()
        elapsed, self.clock = now - self.clock, now
        logs["seconds"] = round(before["seconds"] + elapsed, 1)
        if "loss" in logs:
            tokens = (self.state.global_step - before["step"]) * self.tokens_per_step
            logs["tokens_per_second"] = round(tokens / elapsed)
        super().log(logs, start_time)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", type=Path, required=True, help="a model config, as in configs/pretrain")
    add("--output", type=Path, required=True, help="the folder for checkpoints and, at the end, the model")
    add("--text", type=Path, action="append", default=[], help="file or folder to train on (default: Python's source)")
    add("--heldout-text", type=Path, action="append", default=[], help="file or folder to measure on (likewise)")
    add("--steps", type=int, default=3000)
    add("--batch-size", type=int, default=64, help="rows a step, of all processes together")
    add("--seq-len", type=int, default=1024, help="tokens a row")
    add("--learning-rate", type=float, default=2e-3, help="the highest, after warm-up; it falls to zero as a cosine")
    add("--warmup", type=int, default=100, help="steps")
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--heldout-rows", type=int, help="measure on so many rows only")
    add("--log-every", type=int, default=50, help="steps")
    add("--evaluate-every", type=int, default=500, help="steps")
    add("--save-every", type=int, default=500, help="steps")
    add("--kernels", choices=["torch", "fla"], default="torch", help="PyTorch, or fla's own Triton (CUDA only)")
    return parser.parse_args(arguments)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint; ``trainer_state.json`` is what Trainer writes last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    return str(newest) if newest else None


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    on_cpu = not torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,
        weight_decay=args.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and torch.distributed.is_torchelastic_launched() else None,
        ddp_find_unused_parameters=False,
        bf16=not on_cpu,
        seed=args.seed,
        train_sampling_strategy="sequential",  # the rows come in random order already
        remove_unused_columns=False,
        logging_first_step=True,
        logging_steps=args.log_every,
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        eval_strategy="steps",
        eval_steps=args.evaluate_every,
        save_steps=args.save_every,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
    )
    if args.batch_size % settings.world_size:
        raise KeyreduceError(f"--batch-size {args.batch_size} does not divide among {settings.world_size} processes")
    settings.per_device_train_batch_size = args.batch_size // settings.world_size
    settings.per_device_eval_batch_size = settings.per_device_train_batch_size
    return settings


def save(trainer: ByteTrainer, tokenizer, folder: Path, record: dict) -> None:
    """Write the model in bfloat16, its tokenizer and the record; ``folder`` appears whole or not at all."""
    with appearing(folder, folder=True) as temporary:
        trainer.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "training.json", record)


def main(args: argparse.Namespace) -> None:
    model_folder = args.output / "model"
    if model_folder.exists():
        raise KeyreduceError(f"{model_folder} exists, so this training is done; give another --output")
    recipe = {
        **vars(args),
        "config": read_json(args.config),
        "text": [str(path) for path in args.text],
        "heldout_text": [str(path) for path in args.heldout_text],
    }
    del recipe["output"]
    recipe_file = args.output / "arguments.json"
    checkpoint = last_checkpoint(args.output / "checkpoints")
    if checkpoint and read_json(recipe_file) != recipe:
        raise KeyreduceError(f"{args.output} holds a training with other arguments; give another --output")

    import fla  # noqa: F401  (AutoConfig learns fla's model types)

    if args.kernels == "torch":
        import fla_torch

        fla_torch.enable(cuda=True)

    settings = training_arguments(args)
    if settings.process_index == 0:
        write_json(recipe_file, recipe, overwrite=True)

    tokenizer = byte_tokenizer()
    train_text = text_source(args.text, default="train")
    heldout_text = text_source(args.heldout_text, default="heldout")
    tokens_N = torch.cat(list(document_tokens(train_text.in_pieces(), tokenizer)))
    heldout_rows = list(token_rows(heldout_text.in_pieces(), tokenizer, args.seq_len))[: args.heldout_rows]
    windows = RandomWindows(tokens_N, args.seq_len, args.steps * args.batch_size, args.seed)

    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config))
    tokens_per_step = args.batch_size * args.seq_len
    trainer = ByteTrainer(
        model=model,
        args=settings,
        train_dataset=windows,
        heldout_rows=heldout_rows,
        bytes_V=bytes_per_token(tokenizer),
        tokens_per_step=tokens_per_step,
    )
    trainer.train(resume_from_checkpoint=checkpoint)

    # What ships is bfloat16, so that is what is measured last; the wrapper that Trainer put around forward comes off.
    trainer.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).to(torch.bfloat16)
    trainer.model.config.use_cache = True  # Trainer switched it off for itself
    heldout_bits_per_byte = trainer.bits_per_byte(trainer.model)
    history = trainer.state.log_history
    record = {
        "arguments": recipe,
        "parameters": trainer.model.num_parameters(),
        "text": train_text.describe(),
        "text_tokens": len(tokens_N),
        "tokens_seen": args.steps * tokens_per_step,
        "passes": round(args.steps * args.batch_size / windows.rows_per_pass, 2),
        "seconds": history[-1]["seconds"],
        "train_bits_per_token": next(e["loss"] for e in reversed(history) if "loss" in e) / math.log(2),
        "heldout_text": heldout_text.describe(),
        "heldout_rows": len(heldout_rows),
        "heldout_bits_per_byte": heldout_bits_per_byte,
        "heldout_bits_per_byte_at_step": {
            entry["step"]: entry["heldout_bits_per_byte"] for entry in history if "heldout_bits_per_byte" in entry
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": settings.world_size,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate", "flash-linear-attention")},
        },
    }
    if settings.process_index == 0:
        save(trainer, tokenizer, model_folder, record)
        print(f"{model_folder}: {heldout_bits_per_byte:.3f} bits per byte, held-out")
    leave_processes()


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

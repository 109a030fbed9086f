"""How long pruning a shard set shaped like Qwen3.5-27B takes beside ``cp -r``, and what the cut saves.

    python benchmarks/hybrid.py [--layers 4] [--rounds 3] [--folder FOLDER] [--json figures.json]

Every tensor has the shape that the 27B model has, but there are fewer layers, a vision part of one block, and random
numbers. The state and the sequences that fit are those of all 64 layers.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from checkpoint_inputs import write_source
from commands import KEYREDUCE, Command, machine, measure_rounds, parse_options, report, standard_commands

from keyreduce.api import prune

LAYERS = 64
TEXT = {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 248320,
}
CUTS = {"key channels, 128 to 64": "key", "key and value channels, 128 to 64": "key,value"}
MEMORY = 80e9


def describe(layers: int, vocab_size: int) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the text of config.json, and the tensors on the meta device, in bfloat16."""
    import fla_torch  # noqa: F401  (before fla, which warns where there is no GPU: this silences it)
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {"depth": 1, "out_hidden_size": TEXT["hidden_size"]}
    text = TEXT | {"num_hidden_layers": layers, "vocab_size": vocab_size}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, dtype="bfloat16")
    with torch.device("meta"):
        return config.to_json_string(), AutoModelForImageTextToText.from_config(config).bfloat16().state_dict()


def print_savings(states: dict[str, list[float]], tensors: dict[str, torch.Tensor], layers: int) -> None:
    """Print what each cut leaves of a sequence's state, and how many sequences then fit beside the dense weights."""
    # What the whole language model weighs: the layers that are here, as often as there are such, and the embeddings.
    layer_bytes = 2 * sum(tensor.numel() for name, tensor in tensors.items() if ".layers." in name)
    weight_bytes = 2 * 2 * TEXT["vocab_size"] * TEXT["hidden_size"] + layer_bytes * LAYERS / layers
    sizes = f"{weight_bytes / 1e9:.1f} GB of weights, of {MEMORY / 1e9:.0f} GB"
    print(f"\nThe language model with all {LAYERS} layers, {sizes}:\n")
    print("| cut | state of a sequence, MiB | sequences beside the dense weights |\n|---|---|---|")
    for name, state in states.items():
        count = [int((MEMORY - weight_bytes) / one) for one in state]
        print(f"| {name} | {state[0] / 2**20:.0f} to {state[1] / 2**20:.0f} | {count[0]} to {count[1]} |")


def main() -> None:
    """Time the cuts, and print the table and what they save."""
    fewer = {"type": int, "default": TEXT["vocab_size"], "help": "fewer make a smaller set"}
    options = parse_options(__doc__, 4, 3, ("--vocab-size", fewer))
    with tempfile.TemporaryDirectory(prefix="keyreduce-", dir=options.folder) as temporary:
        source, output = Path(temporary) / "source", Path(temporary) / "output"
        config, tensors = describe(options.layers, options.vocab_size)
        nbytes = 2 * sum(tensor.numel() for tensor in tensors.values())
        if 2.5 * nbytes > shutil.disk_usage(temporary).free:
            sys.exit(f"{temporary} has no room for twice {nbytes / 1e9:.1f} GB: give another --folder")
        write_source(source, config, tensors)
        cut = ("--method", "l2", "--keep", "64", "--output", output)
        words = (*KEYREDUCE, "prune", "--model", source, *cut, "--target")
        commands = standard_commands(source, output)
        commands |= {
            target: Command(f"`keyreduce prune`, {name}", source, (*words, target)) for name, target in CUTS.items()
        }
        figures = measure_rounds(commands, source, output, options.rounds)
        states = {}
        for name, target in CUTS.items():
            cut = {"method": "l2", "keep": "64", "target": target.split(","), "output": output, "overwrite": True}
            result = prune.run(prune.PruneRequest(model=str(source), **cut))
            # Three of four layers have a state.
            share = (LAYERS - LAYERS // 4) / (options.layers - options.layers // 4)
            states[name] = [size * share for size in result.state_bytes_per_sequence]
        facts = f"{options.layers} layers, {nbytes / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards."
        facts += f" {machine(source)}; load at the end {os.getloadavg()[0]:.1f}."
    report(facts, {**figures, "states": states}, options)
    print_savings(states, tensors, options.layers)


if __name__ == "__main__":
    main()

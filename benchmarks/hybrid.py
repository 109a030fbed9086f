"""How long pruning a shard set shaped like Qwen3.5-27B takes beside ``cp -r``, and what the cut saves.

    python benchmarks/hybrid.py [--layers 4] [--rounds 3] [--folder FOLDER] [--json figures.json]

Every tensor has the shape that the 27B model has, but there are fewer layers, a vision part of one block, and random
numbers. The state and the sequences that fit are those of all 64 layers. Before each timing, untimed: earlier outputs
are removed, what was written is on the disk (sync), and the input is read once.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from checkpoint import machine
from checkpoint_inputs import write_source
from processes import can_measure, run_command

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
CUTS = {"key channels, 128 to 64": ("key", "64"), "key and value channels, 128 to 64": ("key,value", "64")}
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


def savings(weight_bytes: float, cut: tuple[str, str]) -> dict:
    """Return what a cut saves of the whole model: bytes of state for a sequence, and sequences beside the weights."""
    from keyreduce.families import FAMILIES
    from keyreduce.pruning.budget import Budget, sizes_after
    from keyreduce.pruning.methods import METHODS

    config, family = {"text_config": TEXT | {"num_hidden_layers": LAYERS}, "model_type": "qwen3_5"}, FAMILIES["qwen3_5"]
    keep = Budget.of(cut[0].split(","), keep=cut[1].split(",")).numbers(config, None, METHODS["l2"], {})
    before = family.layer_sizes(config)
    after = {
        layer: sizes_after(sizes, {target: of[layer] for target, of in keep.items()}) for layer, sizes in before.items()
    }
    states = [4 * sum(sizes.state_elements for sizes in layers.values()) for layers in (before, after)]
    return {
        "state_bytes_per_sequence": states,
        "sequences": [int((MEMORY - weight_bytes) / state) for state in states],
    }


def measure(command: tuple, source: Path, output: Path):
    """Run a command once, from the same state of disk and page cache as every other."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    buffer = bytearray(1 << 24)
    for file in sorted(source.iterdir()):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return run_command(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="every fourth has softmax attention")
    parser.add_argument("--vocab-size", type=int, default=TEXT["vocab_size"], help="fewer make a smaller set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; what is there is removed")
    parser.add_argument("--json", type=Path, help="write the figures, round by round")
    options = parser.parse_args()
    if not can_measure():
        sys.exit("this reads the memory of processes in /proc, as Linux has it, and does not run elsewhere")
    with tempfile.TemporaryDirectory(prefix="keyreduce-", dir=options.folder) as temporary:
        source, output = Path(temporary) / "source", Path(temporary) / "output"
        config, tensors = describe(options.layers, options.vocab_size)
        nbytes = 2 * sum(tensor.numel() for tensor in tensors.values())
        if 2.5 * nbytes > shutil.disk_usage(temporary).free:
            sys.exit(f"{temporary} has no room for twice {nbytes / 1e9:.1f} GB: give another --folder")
        write_source(source, config, tensors)
        prune = (sys.executable, "-m", "keyreduce", "prune", "--model", source, "--method", "l2", "--output", output)
        commands = {"`cp -r`": ("cp", "-r", source, output)}
        commands |= {
            f"`keyreduce prune`, {name}": (*prune, "--target", target, "--keep", keep)
            for name, (target, keep) in CUTS.items()
        }
        runs = {label: [] for label in commands}
        for turn in range(options.rounds + 1):
            for label, command in commands.items():
                runs[label].append(measure(command, source, output))
            print(f"round {turn} of {options.rounds}{'' if turn else ', which does not count'}", file=sys.stderr)
        facts = f"{options.layers} layers, {nbytes / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards."
        facts += f" {machine(source)}; load at the end {os.getloadavg()[0]:.1f}."
    # What the whole language model weighs: the layers that are here, as often as there are such, and the embeddings.
    layer_bytes = 2 * sum(tensor.numel() for name, tensor in tensors.items() if ".layers." in name)
    embeddings = 2 * 2 * TEXT["vocab_size"] * TEXT["hidden_size"]
    weight_bytes = embeddings + layer_bytes * LAYERS / options.layers
    saved = {name: savings(weight_bytes, cut) for name, cut in CUTS.items()}
    print(f"{facts}\n\n| what | seconds, median (least to most) | x `cp -r` | peak anonymous memory, MB |")
    print("|---|---|---|---|")
    seconds = {label: [run.seconds for run in found[1:]] for label, found in runs.items()}
    for label, found in seconds.items():
        times = median(own / copied for own, copied in zip(found, seconds["`cp -r`"], strict=True))
        peak = max(run.tree for run in runs[label]) / 1e6
        print(f"| {label} | {median(found):.1f} ({min(found):.1f} to {max(found):.1f}) | {times:.2f} | {peak:.0f} |")
    whole, memory = weight_bytes / 1e9, MEMORY / 1e9
    print(f"\nThe language model with all {LAYERS} layers, {whole:.1f} GB of weights, of {memory:.0f} GB:\n")
    print("| cut | state of a sequence, MiB | sequences beside the dense weights |\n|---|---|---|")
    for name, figures in saved.items():
        state, count = figures["state_bytes_per_sequence"], figures["sequences"]
        print(f"| {name} | {state[0] / 2**20:.0f} to {state[1] / 2**20:.0f} | {count[0]} to {count[1]} |")
    if options.json:
        rounds = {label: [run._asdict() for run in found[1:]] for label, found in runs.items()}
        options.json.write_text(json.dumps({"facts": facts, "rounds": rounds, "saved": saved}, indent=2) + "\n")


if __name__ == "__main__":
    main()

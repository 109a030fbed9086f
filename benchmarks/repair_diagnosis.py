"""What least squares leaves of a cut's damage, layer by layer, and whether another closed form would leave less.

    python benchmarks/repair_diagnosis.py --model MODEL [--compressed PRUNED | --ratio 0.375 0.2] --output FILE
        [--calibration FILE ...] [--heldout FILE ...] [--num-batches 64] [--heldout-rows 32] [--only NAME ...]
        [--spread 1]
    python benchmarks/repair_diagnosis.py --table FILE

The model is pruned here, unless a folder of it pruned is given. Both models are then taken side by side, block by
block, on calibration text and on held-out text. Written down are, for the model with and without least squares:

- layers: what share of the squares of the dense mixer's output is missing before and after the refit, in sample and
  out of sample; the loss with this layer alone pruned, and with all others pruned; the loss where its refit is undone;
  how ill-conditioned its regression is; how much of the residual stream, and of its error, lies in few directions;
- sums: the error of the residual stream after each block, of all layers pruned and of single ones. Where errors of
  layers neither add up nor cancel, the squares of the first are the sum of the squares of the others;
- variants: the loss on held-out text after other closed forms: other strengths, shrinkage to something else than no
  correction, tokens weighted by the gradient of the loss, other targets, fewer ranks, also the MLP's down projection,
  another share of repeated rows, and less text.

Losses are in nats per token of held-out text. `recall` is the loss on held-out rows of random tokens that repeat, in
their second half, which only memory can predict.

Shapes: B rows, T tokens, N = B * T, D hidden, C channels that a projection receives.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diagnosis_tables import print_report
from torch import nn

from keyreduce.api.functions import prune
from keyreduce.calibration.run import Settings, calibrate_loaded
from keyreduce.checkpoint.find import find_model
from keyreduce.checkpoint.record import Record
from keyreduce.data.batches import batches, spread_of, spread_rows, text_token_ids, token_rows
from keyreduce.data.text import text_source
from keyreduce.devices import device_name, pick_device
from keyreduce.models.classes import family_in, vocabulary_of
from keyreduce.models.in_memory import ModuleCheckpoint, loaded_module
from keyreduce.models.loading import LoadedModel, load_model, prepare_backend
from keyreduce.outputs import read_json, write_json
from keyreduce.recovery.least_squares import HELDOUT_EVERY, STRENGTHS, NormalEquations
from keyreduce.recovery.modes import REPEATS
from keyreduce.recovery.repeats import with_repeats
from keyreduce.recovery.streams import Stream, open_stream
from keyreduce.recovery.writing_strength import corrected_heads, restore_writing_strength

HELDOUT_LENGTH = 1024
RECALL_ROWS = 4  # of half that length
MOST_WEIGHT = 10.0  # of a token, in multiples of the mean
WIDER = (*STRENGTHS, 10.0, 100.0)


class Variant(NamedTuple):
    """A closed form.

    Attributes:
        strengths: of the ridge, to choose from on every eighth batch.
        toward: what the penalty holds on to. ``projection``: the correction is to be small; ``zero``: the corrected
            projection is; ``identity``: the correction is a square matrix behind the projection, and that is to be
            small; ``scales``: it is one factor for each channel before it.
        factor: what the correction is multiplied by.
        rank: of the correction, as a share of the channels of the hidden states; None for any.
        is_weighted: whether a token counts by its squared gradient of the loss.
        own_input: 0 where the target is what the dense mixer gives on the dense model's hidden states, 1 on the pruned
            model's, between them a mixture.
        feedback: the share of the error of the hidden states so far that is added to the target.
        down: whether the MLP's down projection is refitted after it, to what the dense block gives.
        repeats: the weight of rows of random tokens that repeat.
        tokens: the share of the calibration text that is taken.
        layers: which are refitted, of thirds of the model from the bottom.
    """

    strengths: Sequence[float] = STRENGTHS
    toward: str = "projection"
    factor: float = 1.0
    rank: float | None = None
    is_weighted: bool = False
    own_input: float = 0.0
    feedback: float = 0.0
    down: bool = False
    repeats: float = 1.0
    tokens: float = 1.0
    layers: Sequence[int] = (0, 1, 2)


TODAY = "least squares"
VARIANTS = {
    TODAY: Variant(),
    "strength 1e-4": Variant((1e-4,)),
    "strength 1e-2": Variant((1e-2,)),
    "strength 1e-1": Variant((1e-1,)),
    "strength 1": Variant((1.0,)),
    "wider strengths": Variant(WIDER),
    "half of the correction": Variant(factor=0.5),
    "toward zero": Variant(toward="zero"),
    "toward identity": Variant(WIDER, toward="identity"),
    "scales": Variant(WIDER, toward="scales"),
    "rank 1/64": Variant(rank=1 / 64),
    "rank 1/16": Variant(rank=1 / 16),
    "rank 1/4": Variant(rank=1 / 4),
    "weighted tokens": Variant(is_weighted=True),
    "own input": Variant(own_input=1.0),
    "own input, half": Variant(own_input=0.5),
    "feedback 0.25": Variant(feedback=0.25),
    "feedback 1": Variant(feedback=1.0),
    "down projection": Variant(down=True),
    "down projection, own input, half": Variant(down=True, own_input=0.5),
    "no repeats": Variant(repeats=0.0),
    "repeats x 3": Variant(repeats=3.0),
    "a half of the text": Variant(tokens=0.5),
    "a quarter of the text": Variant(tokens=0.25),
    "lowest third": Variant(layers=(0,)),
    "middle third": Variant(layers=(1,)),
    "highest third": Variant(layers=(2,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default the one that ships with keyreduce")
    parser.add_argument("--compressed", type=Path, help="the folder of the pruned model")
    parser.add_argument("--ratio", type=float, nargs=2, default=(0.375, 0.2), help="of key and value channels, else")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--calibration", type=Path, nargs="+", default=(), help="by default the standard library")
    parser.add_argument("--heldout", type=Path, nargs="+", default=(), help="by default other files of that")
    parser.add_argument("--num-batches", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument(
        "--spread", type=int, help="times as much text as rows are taken of; by default as recover does"
    )
    parser.add_argument("--heldout-rows", type=int, default=32, help=f"of {HELDOUT_LENGTH} tokens")
    parser.add_argument("--layer-rows", type=int, default=16, help="of these, on which single layers are measured")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print this one, and measure nothing")
    options = parser.parse_args()
    report = read_json(options.table) if options.table else Diagnosis(options).measure()
    print_report(report)


class Diagnosis:
    """A dense and a pruned model, their text, and what is measured of them."""

    @torch.no_grad()
    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, pick_device(options.device)
        self.began = time.perf_counter()
        dense = load_model(find_model(options.model), self.device, torch.float32, gradients=True)
        calibration = text_source(options.calibration, default="calibration")
        pruned = self._pruned(dense, calibration)
        prepare_backend(self.device, gradients=True)
        self.layers = range(pruned.family.depth(pruned.model.config.to_dict()))
        self.mixers = pruned.family.mixer_layers(pruned.model.config.to_dict())
        self._take_text(dense, calibration)
        before, self.after = (
            open_stream(one.model, family_in(one.model), self.batches, self.device, self.device)
            for one in (dense, pruned)
        )
        self.dense, self.pruned, self.before = dense.model, pruned.model, before
        self.start = list(self.after.hidden)
        self.kept = {name: one.detach().clone() for name, one in self.pruned.named_parameters()}
        # What the dense model gives, of all layers: before the block, of the mixer, and at the end.
        self.hidden, self.mixed = [], []
        for layer in self.layers:
            self.hidden.append(list(before.hidden))
            self.mixed.append(before.advance(layer, keep_mixer=layer in self.mixers))
        self.hidden.append(list(before.hidden))
        self.gradients: list[list[torch.Tensor]] = []

    def _pruned(self, dense: LoadedModel, text: Any) -> LoadedModel:
        options = self.options
        if options.compressed is not None:
            pruned = load_model(options.compressed, self.device, torch.float32, gradients=True, with_tokenizer=False)
            restore_writing_strength(dense, pruned, corrected_heads(Record.read(options.compressed)))
            return pruned
        settings = Settings(options.num_batches, options.batch_size, options.seq_len, options.seed)
        statistics = calibrate_loaded(dense, ModuleCheckpoint(dense.model), text, settings, torch.float32)
        cut = {"target": ("key", "value"), "ratio": tuple(options.ratio), "method": options.method}
        module: Any = prune(dense.model, statistics=statistics, uncorrected=True, seed=options.seed, **cut)
        return loaded_module(module, dense.tokenizer, gradients=True)

    def _take_text(self, dense: LoadedModel, calibration: Any) -> None:
        """Take batches: those to fit on, of which some rows repeat, then held-out text, then a batch that repeats."""
        options, tokenizer = self.options, dense.tokenizer
        drawn_from = text_token_ids(tokenizer, vocabulary_of(dense.model))
        taken = token_rows(calibration.in_pieces(options.seed), tokenizer, options.seq_len)
        number = options.num_batches * options.batch_size
        self.spread = options.spread or spread_of(number * options.seq_len)
        rows = spread_rows(taken, number, self.spread)
        mixed = list(with_repeats(rows, REPEATS, drawn_from, options.seed))
        fitted = list(batches(mixed, options.batch_size))
        repeats = [not one.equal(other) for one, other in zip(mixed, rows, strict=True)]
        self.is_repeat = [torch.tensor(some) for some in _in_pieces(repeats, options.batch_size)]
        heldout = text_source(options.heldout, default="heldout")
        taken = token_rows(heldout.in_pieces(options.seed + 1), tokenizer, HELDOUT_LENGTH)
        text = list(batches(spread_rows(taken, max(4, options.heldout_rows // 4 * 4)), 4))
        like = torch.zeros(HELDOUT_LENGTH // 2, dtype=torch.long)
        recall = list(batches(with_repeats([like] * RECALL_ROWS, 1.0, drawn_from, options.seed + 2), RECALL_ROWS))
        self.batches = [*fitted, *text, *recall]
        self.fitted = range(len(fitted))
        self.heldout = range(len(fitted), len(fitted) + len(text))
        self.few = self.heldout[: max(1, options.layer_rows // 4)]
        self.recall = range(len(fitted) + len(text), len(self.batches))

    def measure(self) -> dict:
        """Return everything, as JSON; with --output, it is written after every part."""
        options = self.options
        sizes = next(iter(self.after.family.layer_sizes(self.pruned.config.to_dict()).values()))
        report: dict[str, Any] = {
            "model": Path(options.model or "the shipped model").name,
            "parameters": sum(one.numel() for one in self.dense.parameters()),
            "sizes": sizes._asdict(),
            "device": device_name(self.device),
            "calibration_tokens": sum(self.batches[place].numel() for place in self.fitted),
            "spread": self.spread,
            "layer_rows": options.layer_rows,
            "heldout_tokens": sum(self.batches[place].numel() for place in self.heldout),
            "dense": self.losses(self.hidden[-1]),
            "variants": {},
        }
        report["layers"], given = self.of_layers()
        report["pruned"] = self.losses(given)
        report["few_rows"] = {"dense": self.loss(self.hidden[-1]), "pruned": self.loss(given)}
        self.keep(report)
        report["sums"] = self.sums()
        self.keep(report)
        for name in dict.fromkeys((TODAY, *options.only)):
            began = time.perf_counter()
            figures, given = self.repair(VARIANTS[name])
            found = self.losses(given) | {"seconds": round(time.perf_counter() - began, 1)}
            if name == TODAY:
                report["few_rows"]["repaired"] = self.loss(given)
            found |= {key: _mean(one[key] for one in figures.values()) for key in ("in_sample", "out_of_sample")}
            report["variants"][name] = found
            if name == TODAY:
                for layer, more in figures.items():
                    report["layers"][str(layer)] |= more
                self.undo_one_by_one(report)
            self.keep(report)
            print(f"{name}: {found['heldout']:.4f}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        return report

    def keep(self, report: dict) -> None:
        report["seconds"] = round(time.perf_counter() - self.began, 1)
        if self.options.output is not None:
            write_json(self.options.output, report, overwrite=True)

    def losses(self, hidden: Sequence[torch.Tensor]) -> dict[str, float]:
        """Return the losses of the dense head on what the last block gives for all batches."""
        return {"heldout": self.mean_loss(hidden, self.heldout), "recall": self.mean_loss(hidden, self.recall, 0.5)}

    def loss(self, hidden: Sequence[torch.Tensor]) -> float:
        """Return the loss on the few held-out rows on which single layers are measured."""
        return self.mean_loss(hidden, self.few)

    @torch.no_grad()
    def mean_loss(self, hidden: Sequence[torch.Tensor], places: Sequence[int], skip: float = 0.0) -> float:
        inside: Any = self.dense.get_submodule(self.after.family.mixer.split(".layers.")[0])
        head: Any = self.dense.get_output_embeddings()
        nats, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for place in places:
            tokens_BT = self.batches[place].to(self.device)
            first = int(skip * tokens_BT.shape[1])
            for row_TD, tokens_T in zip(hidden[place], tokens_BT, strict=True):
                logits_TV = head(inside.norm(row_TD[None]))[0, first:-1].float()
                nats += F.cross_entropy(logits_TV, tokens_T[first + 1 :], reduction="sum").double()
                count += len(tokens_T) - first - 1
        return float(nats) / count

    def block_pass(self, stream: Stream, layer: int, hidden: list[torch.Tensor], places: Sequence[int]) -> None:
        """Replace hidden states by what a block of a model gives, for some batches."""
        for place in places:
            hidden[place] = stream.call(layer, hidden[place], self.batches[place].to(self.device))

    @torch.no_grad()
    def of_layers(self) -> tuple[dict[str, dict], list[torch.Tensor]]:
        """Return of each layer what cutting it alone costs, and sparing it alone; and what the pruned model gives."""
        everywhere, places = [*self.heldout, *self.recall], list(self.few)
        pruned = [list(self.start)]
        for layer in self.layers:
            pruned.append(list(pruned[-1]))
            self.block_pass(self.after, layer, pruned[-1], everywhere)
        found: dict[str, dict] = {}
        for layer in self.mixers:
            alone, spared = list(self.hidden[layer]), list(pruned[layer])
            self.block_pass(self.after, layer, alone, places)
            self.block_pass(self.before, layer, spared, places)
            for above in self.layers[layer + 1 :]:
                self.block_pass(self.before, above, alone, places)
                self.block_pass(self.after, above, spared, places)
            found[str(layer)] = {"alone": self.loss(alone), "spared": self.loss(spared)}
            found[str(layer)] |= self.directions(self.hidden[layer], pruned[layer])
        return found, pruned[-1]

    def directions(self, dense: Sequence[torch.Tensor], pruned: Sequence[torch.Tensor]) -> dict[str, float]:
        """Return the share of the residual stream before a block, and of its error, that few directions have."""
        width = dense[0].shape[-1]
        stream_DD, error_DD = (torch.zeros(width, width, dtype=torch.float64, device=self.device) for _ in range(2))
        for place in self.heldout:
            stream_ND = dense[place].flatten(0, 1).double()
            error_ND = stream_ND - pruned[place].flatten(0, 1).double()
            stream_DD += stream_ND.T @ stream_ND
            error_DD += error_ND.T @ error_ND
        values_D, vectors_DD = torch.linalg.eigh(stream_DD)
        top_D4 = vectors_DD[:, -4:]
        energy = max(float(error_DD.trace()), 1e-300)
        return {
            "channel_1": float(stream_DD.diagonal().max() / stream_DD.trace()),
            "direction_1": float(values_D[-1] / values_D.sum()),
            "directions_4": float(values_D[-4:].sum() / values_D.sum()),
            "error_in_directions_4": float((top_D4.T @ error_DD @ top_D4).trace()) / energy,
            "error_direction_1": float(torch.linalg.eigvalsh(error_DD)[-1]) / energy,
            "relative_error": energy / float(stream_DD.trace()),
        }

    @torch.no_grad()
    def sums(self) -> dict[str, dict[str, float]]:
        """Return of each block the squares of errors behind it, over those of the dense stream, on a few rows.

        ``all``: with all layers pruned. ``squares``: summed over models of which one layer is pruned. ``vectors``: of
        the sum of their errors.
        """
        places = list(self.few)
        everything, single, found = list(self.start), {}, {}
        for layer in self.layers:
            self.block_pass(self.after, layer, everything, places)
            for hidden in single.values():
                self.block_pass(self.before, layer, hidden, places)
            if layer in self.mixers:
                single[layer] = list(self.hidden[layer])
                self.block_pass(self.after, layer, single[layer], places)
            totals = dict.fromkeys(("stream", "all", "squares", "vectors"), 0.0)
            for place in places:
                dense = self.hidden[layer + 1][place].double()
                errors = [hidden[place].double() - dense for hidden in single.values()]
                totals["stream"] += float(dense.square().sum())
                totals["all"] += float((everything[place].double() - dense).square().sum())
                totals["squares"] += sum(float(one.square().sum()) for one in errors)
                totals["vectors"] += float(sum(errors, torch.zeros_like(dense)).square().sum())
            stream = totals.pop("stream")
            found[str(layer)] = {name: value / stream for name, value in totals.items()}
        return found

    def undo_one_by_one(self, report: dict) -> None:
        """Add to each layer the loss of the repaired model in which its projection is as it was cut."""
        places = list(self.few)
        with torch.no_grad():
            repaired = [list(self.start)]
            for layer in self.layers:
                repaired.append(list(repaired[-1]))
                self.block_pass(self.after, layer, repaired[-1], places)
            for layer in self.mixers:
                weight_DC = self.after.projection(layer).weight
                mine = weight_DC.detach().clone()
                weight_DC.copy_(self.kept[self._name_of(weight_DC)])
                hidden = list(repaired[layer])
                for above in self.layers[layer:]:
                    self.block_pass(self.after, above, hidden, places)
                weight_DC.copy_(mine)
                report["layers"][str(layer)]["undone"] = self.loss(hidden)

    def _name_of(self, parameter: torch.Tensor) -> str:
        return next(name for name, one in self.pruned.named_parameters() if one is parameter)

    @torch.no_grad()
    def repair(self, variant: Variant) -> tuple[dict[int, dict[str, float]], list[torch.Tensor]]:
        """Repair the pruned model in a way, from the cut on, and return figures of layers, and the last hidden states.

        Figures are ``in_sample`` and ``out_of_sample``, the share of what is missing of the dense mixer's output that
        the refit removed, ``missing`` and ``missing_heldout``, which share that was before, and of the regression the
        ``condition`` and the ``ridge``.
        """
        for name, parameter in self.pruned.named_parameters():
            parameter.copy_(self.kept[name])
        after, figures = self.after, {}
        after.hidden[:] = self.start
        for layer in self.layers:
            third = 3 * layer // len(self.layers)
            if layer in self.mixers and third in variant.layers:
                figures[layer] = self.refit(variant, layer)
            if variant.down and third in variant.layers:
                self.refit_down(variant, layer)
            after.advance(layer)
        return figures, list(after.hidden)

    def refit(self, variant: Variant, layer: int) -> dict[str, float]:
        weight_DC = self.after.projection(layer).weight
        sums = {name: self.equations(weight_DC) for name in ("fitted", "choice", "in", "out")}
        energy: dict[str, float] = dict.fromkeys(("in", "out"), 0.0)
        for place in [*self.taken(variant), *self.heldout]:
            inputs_BTC, output_BTD = self.after.see_mixer(layer, place)
            plain_BTD = self.mixed[layer][place] - output_BTD
            where = "out" if place in self.heldout else "in"
            sums[where].add(inputs_BTC.flatten(0, 1), plain_BTD.flatten(0, 1))
            energy[where] += float(self.mixed[layer][place].double().square().sum())
            if where == "out":
                continue
            target_BTD = self.target(variant, layer, place)
            root_BT1 = self.weights(variant, layer, place).sqrt()[..., None]
            rows = (inputs_BTC * root_BT1, (target_BTD - output_BTD) * root_BT1)
            is_choice = place % HELDOUT_EVERY == HELDOUT_EVERY - 1
            sums["choice" if is_choice else "fitted"].add(*(one.flatten(0, 1) for one in rows))
        correction_DC, strength = fit(variant, weight_DC.double(), sums["fitted"], sums["choice"])
        found = {"ridge": strength}
        if variant == VARIANTS[TODAY]:
            values_C = torch.linalg.eigvalsh(sums["in"].gram_CC).clamp(min=0)
            found["condition"] = float(values_C[-1] / values_C[0].clamp(min=1e-300))
            found["directions_used"] = float(values_C.sum().square() / values_C.square().sum())
        for where, name in (("in", "in_sample"), ("out", "out_of_sample")):
            left = sums[where].error(correction_DC)
            found[name] = 1 - left / max(float(sums[where].energy), 1e-300)
            found["missing" if where == "in" else "missing_heldout"] = float(sums[where].energy) / energy[where]
        weight_DC += correction_DC.to(weight_DC.dtype)
        return found

    def refit_down(self, variant: Variant, layer: int) -> None:
        """Refit the MLP's down projection to what the dense block gives."""
        mlp: Any = self.after.block(layer).get_submodule("mlp")
        weight_DC = mlp.down_proj.weight
        sums = [self.equations(weight_DC) for _ in range(2)]
        for place in self.taken(variant):
            inputs_BTD: list[torch.Tensor] = []
            with mlp.register_forward_pre_hook(lambda module, args, seen=inputs_BTD: seen.append(args[0])):
                output_BTD = self.after.run(layer, place)
            inner_BTC = F.silu(mlp.gate_proj(inputs_BTD[0])) * mlp.up_proj(inputs_BTD[0])
            target_BTD = self.hidden[layer + 1][place]
            if variant.own_input:
                own_BTD = self.before.call(layer, self.after.hidden[place], self.batches[place].to(self.device))
                target_BTD = torch.lerp(target_BTD, own_BTD, variant.own_input)
            root_BT1 = self.weights(variant, layer, place).sqrt()[..., None]
            rows = (inner_BTC * root_BT1, (target_BTD - output_BTD) * root_BT1)
            sums[place % HELDOUT_EVERY == HELDOUT_EVERY - 1].add(*(one.flatten(0, 1) for one in rows))
        correction_DC, _ = fit(Variant(WIDER), weight_DC.double(), *sums)
        weight_DC += correction_DC.to(weight_DC.dtype)

    def equations(self, weight_DC: torch.Tensor) -> NormalEquations:
        return NormalEquations(weight_DC.shape[1], weight_DC.shape[0], self.device)

    def taken(self, variant: Variant) -> range:
        return self.fitted[: max(HELDOUT_EVERY, round(variant.tokens * len(self.fitted)))]

    def target(self, variant: Variant, layer: int, place: int) -> torch.Tensor:
        """Return what a mixer is fitted to."""
        target_BTD = self.mixed[layer][place]
        if variant.own_input:
            tokens_BT = self.batches[place].to(self.device)
            own_BTD = self.before.call_mixer(layer, self.after.hidden[place], tokens_BT)[1]
            target_BTD = torch.lerp(target_BTD, own_BTD, variant.own_input)
        if variant.feedback:
            target_BTD = target_BTD + variant.feedback * (self.hidden[layer][place] - self.after.hidden[place])
        return target_BTD

    def weights(self, variant: Variant, layer: int, place: int) -> torch.Tensor:
        """Return what tokens count, ``[B, T]``."""
        weight_BT = torch.ones(self.batches[place].shape, device=self.device)
        if variant.is_weighted:
            self.gradients = self.gradients or self.squared_gradients()
            weight_BT = weight_BT * self.gradients[layer][place]
        if variant.repeats != 1:
            weight_BT[self.is_repeat[place].to(self.device)] *= variant.repeats
        return weight_BT

    @torch.enable_grad()
    def squared_gradients(self) -> list[list[torch.Tensor]]:
        """Return, for each layer and batch, the squares of the loss' gradient at what the mixer gives, ``[B, T]``.

        They are in multiples of the layer's mean, and at most :data:`MOST_WEIGHT`.
        """
        found: list[list[torch.Tensor]] = [[] for _ in self.layers]
        self.dense.requires_grad_(False)
        embeddings: Any = self.dense.get_input_embeddings()
        for place in self.fitted:
            tokens_BT, kept = self.batches[place].to(self.device), {}
            with _hooks(self.before, self.layers, kept):
                embedded_BTD = embeddings(tokens_BT).requires_grad_()
                logits_BTV = self.dense(inputs_embeds=embedded_BTD, use_cache=False).logits
            F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum").backward()
            for layer in self.layers:
                found[layer].append(kept[layer].grad.square().sum(-1))
        for of_layer in found:
            mean = torch.stack([one.mean() for one in of_layer]).mean()
            of_layer[:] = [(one / mean).clamp(max=MOST_WEIGHT) for one in of_layer]
        return found


def _hooks(stream: Stream, layers: range, kept: dict[int, torch.Tensor]) -> contextlib.ExitStack:
    """Return a context in which the output of each mixer is kept, with its gradient."""
    stack = contextlib.ExitStack()
    for layer in layers:

        def keep(module: nn.Module, args: tuple, output: Any, layer: int = layer) -> None:
            kept[layer] = output[0] if isinstance(output, tuple) else output
            kept[layer].retain_grad()

        stack.enter_context(stream.mixer(layer).register_forward_hook(keep))
    return stack


def fit(
    variant: Variant, weight_DC: torch.Tensor, fitted: NormalEquations, choice: NormalEquations
) -> tuple[torch.Tensor, float]:
    """Return the correction ``[D, C]`` of a projection, and the strength that was chosen."""
    errors = [choice.error(correction_DC) for correction_DC in solve(variant, weight_DC, fitted, variant.strengths)]
    strength = variant.strengths[errors.index(min(errors))]
    (correction_DC,) = solve(variant, weight_DC, fitted + choice, [strength])
    return correction_DC, strength


def solve(
    variant: Variant, weight_DC: torch.Tensor, sums: NormalEquations, strengths: Sequence[float]
) -> Iterator[torch.Tensor]:
    """Yield the correction ``[D, C]`` for each strength."""
    gram_CC, cross_DC = sums.gram_CC, sums.cross_DC
    if variant.toward == "identity":  # W' = (1 + M) W
        gram_DD, cross_DD = weight_DC @ gram_CC @ weight_DC.T, cross_DC @ weight_DC.T
        found = [square_DD @ weight_DC for square_DD in ridge(gram_DD, cross_DD, strengths)]
    elif variant.toward == "scales":  # W' = W (1 + diag(s))
        scaled_CC, cross_1C = (weight_DC.T @ weight_DC) * gram_CC, (weight_DC * cross_DC).sum(0, keepdim=True)
        found = [weight_DC * scale_1C for scale_1C in ridge(scaled_CC, cross_1C, strengths)]
    elif variant.toward == "zero":
        mean = gram_CC.diagonal().mean()
        found = [ridge(gram_CC, cross_DC - one * mean * weight_DC, [one])[0] for one in strengths]
    else:
        found = ridge(gram_CC, cross_DC, strengths)
    for correction_DC in found:
        if variant.rank is not None:
            # The directions of the hidden states in which the correction changes most.
            changed_DD = correction_DC @ gram_CC @ correction_DC.T
            top_DR = torch.linalg.eigh(changed_DD)[1][:, -max(1, round(variant.rank * len(changed_DD))) :]
            correction_DC = top_DR @ (top_DR.T @ correction_DC)
        yield variant.factor * correction_DC


def ridge(gram_CC: torch.Tensor, cross_DC: torch.Tensor, strengths: Sequence[float]) -> list[torch.Tensor]:
    """Return ridge regression's solution for each strength, a multiple of the mean square of the inputs."""
    sums = NormalEquations(0, 0)
    sums.gram_CC, sums.cross_DC = gram_CC, cross_DC
    return sums.solve(strengths)


def _in_pieces(values: Sequence, length: int) -> list[Sequence]:
    return [values[first : first + length] for first in range(0, len(values), length)]


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


if __name__ == "__main__":
    main()

"""What ``prune`` says at its end: what became smaller, and where such sizes run."""


def report_cut(console, name, source, plan, saved, folder, *, repair=None) -> None:
    """Print the table of a cut, and its JSON object."""
    from keyreduce.families import MixerSizes, family_of
    from keyreduce.pruning.engines import suited_engines

    before, after = plan.before.values(), plan.after.values()

    def sizes(name: str) -> list[str]:
        """A size, or the smallest and largest where layers differ."""
        ranges = [sorted({getattr(layer, name) for layer in layers}) for layers in (before, after)]
        return [f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}" for values in ranges]

    def alike(name: str, layers):
        """A size, or a list of one for each layer where they differ."""
        values = [getattr(layer, name) for layer in layers]
        return values[0] if len(set(values)) == 1 else values

    def total(name: str) -> list[int]:
        return [sum(getattr(layer, name) for layer in layers) for layers in (before, after)]

    rows = []
    for label, size in (
        ("key heads", "key_heads"),
        ("key channels a head", "head_k_dim"),
        ("value channels a head", "head_v_dim"),
    ):
        if plan.before != plan.after and total(size)[0] == total(size)[1]:
            continue  # what stayed is not news
        rows.append((label, *sizes(size), *total(size)))
    rows += [
        (
            "state per sequence, float32",
            *(f"{size / 2**20:,.2f} MiB" for size in saved.state_bytes_per_sequence),
            *saved.state_bytes_per_sequence,
        ),
        ("mixer parameters", *(f"{count:,}" for count in saved.mixer_parameters), *saved.mixer_parameters),
        ("model parameters", *(f"{count:,}" for count in saved.model_parameters), *saved.model_parameters),
    ]
    console.table(
        f"{name}, pruned with {plan.inputs['method']}",
        ("", "before", "after", "smaller by"),
        [(label, was, now, f"{100 * (1 - less / more):.1f}%") for label, was, now, more, less in rows],
    )
    console.say(saved.sentence)
    suited, unsuited = suited_engines(family_of(source.config), set(after))
    if suited:
        console.say(f"its sizes suit: {'; '.join(suited)}")
    if unsuited:
        console.say(f"not: {'; '.join(unsuited)}")
    if repair:
        console.say(f"repaired: {repair['mode']}, on {repair['tokens']:,} tokens, in {repair['seconds']:.0f} s")
    console.say(f"wrote {folder}")
    console.result(
        {
            "pruned": str(folder),
            "made": True,
            "method": plan.inputs["method"],
            "target": plan.inputs["target"],
            **{name: [alike(name, before), alike(name, after)] for name in MixerSizes._fields},
            **{name: list(values) for name, values in saved._asdict().items()},
            "smaller": saved.sentence,
            "suited_engines": suited,
            **({"repair": {name: repair[name] for name in ("mode", "tokens", "seconds", "layers")}} if repair else {}),
        }
    )

"""What ``prune`` does around the cut: the sums that it needs, the repair, and what was made before."""

import shutil
from pathlib import Path


def recorded_inputs(folder: Path) -> dict | None:
    """What a pruned checkpoint was made from, repairs included; None where there is none."""
    from keyreduce.pruning.prune import read_record

    record = read_record(folder)
    if not record.get("steps"):
        return None
    repairs = [[repair["inputs"]["mode"], repair["inputs"]["text"]["identity"]] for repair in record.get("repairs", [])]
    return record["steps"][-1]["inputs"] | ({"repairs": repairs} if repairs else {})


def repair_cut(text, cut: Path, folder: Path, *, mode: str, device, seed: int, overwrite: bool) -> dict:
    """Repair the checkpoint ``cut`` into ``folder``, remove it, and return what keyreduce recover says of that."""
    from keyreduce.cli.console import Console
    from keyreduce.cli.recover_layers import write_recovered

    try:
        return write_recovered(
            Console(as_json=True),
            None,
            str(cut),
            text,
            folder,
            mode=mode,
            options={},
            amount=(32, 8, 512, seed),  # the defaults of keyreduce recover
            device=device,
            overwrite=overwrite,
        )
    finally:
        shutil.rmtree(cut, ignore_errors=True)


def calibrated(console, model, config, source, text, calibration, workspace, device, *, gradients):
    """Return the calibration sums, which are made from the text where none are named and none are there."""
    from keyreduce.calibration.file import read_record, read_statistics
    from keyreduce.errors import KeyreduceError
    from keyreduce.pruning.planning import check_calibration

    path = calibration or workspace.calibration
    if calibration is None and not path.exists():
        from keyreduce.api import calibrate
        from keyreduce.cli.console import Console

        console.note(f"there are no calibration sums at {path}: calibrating first")
        request = calibrate.CalibrateRequest(
            model=model, output=path, config=config, device=device, gradients=gradients, **text
        )
        calibrate.run(request, Console(as_json=True))
    check_calibration(source, read_record(path)["model"])
    statistics = read_statistics(path)
    try:
        statistics.check_finite()
    except KeyreduceError:
        raise KeyreduceError(
            f"{path} holds NaN or inf: it is damaged; make it again with keyreduce calibrate --overwrite"
        ) from None
    return statistics

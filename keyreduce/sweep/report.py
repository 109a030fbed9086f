"""The files that show a sweep's results: tables, pictures and a page."""

from pathlib import Path

from matplotlib.figure import Figure

from keyreduce.errors import KeyreduceError
from keyreduce.outputs import appearing
from keyreduce.sweep.page import page
from keyreduce.sweep.plots import draw_pareto, draw_perplexity
from keyreduce.sweep.results import Results
from keyreduce.sweep.tables import as_csv, latex, markdown

NAMES = ("table.md", "table.csv", "table.tex", "perplexity.png", "pareto.png", "table.html")


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write tables, pictures and page into a folder, each whole or not at all, and return their paths.

    Raises:
        KeyreduceError: no way of pruning has a result yet, or the folder cannot be written.
    """
    if not results.rows:
        why = next(iter(results.failed.values()), "no run that prunes is done, or no dense model")
        raise KeyreduceError(f"there is nothing to show yet: {why}")
    folder = Path(folder)
    files = {
        "table.md": lambda path: path.write_text(markdown(results), encoding="utf-8"),
        "table.csv": lambda path: path.write_text(as_csv(results), encoding="utf-8"),
        "table.tex": lambda path: path.write_text(latex(results), encoding="utf-8"),
        "perplexity.png": lambda path: _save(draw_perplexity(results), path),
        "pareto.png": lambda path: _save(draw_pareto(results), path),
        "table.html": lambda path: path.write_text(page(results, _pictures(results, folder)), encoding="utf-8"),
    }
    for name, write in files.items():
        with appearing(folder / name, folder=False, overwrite=True) as temporary:
            write(temporary)
    return [folder / name for name in files]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=130)


def _pictures(results: Results, folder: Path) -> dict[str, Path]:
    against = "speed" if results.kinds else "size of the state"
    return {
        "Perplexity against the share removed": folder / "perplexity.png",
        f"Perplexity against {against}": folder / "pareto.png",
    }

"""Where text comes from: files, a ``datasets`` name, or the default; always a stream of documents.

The default is the source of the Python standard library on the machine that runs this. Every machine with Python has
it, and nothing is redistributed. The split follows a hash of each file's relative path, so a file that is held out
under one version of Python is held out under every other.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import random
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TypeVar

from keyreduce.errors import KeyreduceError, reason
from keyreduce.outputs import dangling_link

_log = logging.getLogger(__name__)

_Any = TypeVar("_Any")
Split = Literal["train", "calibration", "heldout"]
# Installed packages are not the standard library, and not every machine has its test suite.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TEXT_FIELD = "text"
_SHUFFLE_BUFFER = 1_000  # documents
_SAMPLE_BYTES = 1 << 16
_PIECE = 1 << 16  # characters of a file that are read at a time

# What is mended in a text instead of being refused, as the log counts it.
_NULL = "{} without text left out"
_HALVES = "{} with half a surrogate pair, which became U+FFFD"
_NULS = "{} with NUL bytes, which were left out"


def split_of(relative_path: str) -> Split:
    """Return the split of a file, by its POSIX path below the library's folder: 8 of 10 parts train."""
    part = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 10
    return "calibration" if part == 8 else "heldout" if part == 9 else "train"


def stdlib_files(split: Split) -> list[Path]:
    """Return the ``*.py`` files of one split, sorted by their path below the library's folder."""
    root = Path(sysconfig.get_path("stdlib"))
    chosen = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        relative_paths = ((Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py"))
        chosen += [path for path in relative_paths if split_of(path) == split]
    return [root / path for path in sorted(chosen)]


def stdlib_documents(split: Split) -> Iterator[str]:
    """Yield the text of each file of one split, in the order of `stdlib_files`; what is not UTF-8 is skipped."""
    for path in stdlib_files(split):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


class Repairs:
    """What was mended in a text while it was read: a sentence in the log, and no refusal hours into a run."""

    def __init__(self):
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}
        self._logged: dict[str, int] = {}

    def add(self, kind: str, where: str) -> None:
        """Count a document in which something was mended."""
        self._first.setdefault(kind, where)
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def log(self) -> None:
        """Log what was counted in this pass over the text, unless an earlier pass had as much to say."""
        for kind, count in self._counts.items():
            if count > self._logged.get(kind, 0):
                self._logged[kind] = count
                documents = f"{count:,} document{'s' if count > 1 else ''}"
                _log.warning("text: %s (the first: %s)", kind.format(documents), self._first[kind])
        self._counts.clear()

    def text(self, text: str, where: str) -> str:
        """Return a text that can be encoded: each half of a surrogate pair that stands alone becomes U+FFFD."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.add(_HALVES, where)
            return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
        return text


class TextSource(ABC):
    """Documents, streamed, and what identifies them."""

    @cached_property
    def repairs(self) -> Repairs:
        """What was mended in the documents that were read so far."""
        return Repairs()

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """Return a stream of the documents that are not empty, shuffled with a seed by way of 1,000 in memory.

        Rows whose text is null are left out, and what no tokenizer could read is mended; the log says how many.

        Raises:
            KeyreduceError: a document cannot be read, or there is not one character of text.
        """
        return map("".join, self.in_pieces(seed))

    def in_pieces(self, seed: int | None = None) -> Iterator[Iterable[str]]:
        """Return what :meth:`documents` does, each document in pieces that joined are its text.

        A file that is one document is read while its pieces are taken, so that it may be larger than memory.
        """
        return self._not_empty(self._stream(seed))

    @abstractmethod
    def describe(self) -> dict:
        """Return what the text is, as a JSON object for records and tables."""

    @cached_property
    def identity(self) -> str:
        """A string that two sources share when they hold the same text in the same order."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict:
        return self.describe()

    @abstractmethod
    def _stream(self, seed: int | None) -> Iterator[Iterable[str]]: ...

    def _not_empty(self, documents: Iterator[Iterable[str]]) -> Iterator[Iterable[str]]:
        is_empty = True
        try:
            for document in documents:
                pieces = filter(None, document)
                if first := next(pieces, None):
                    is_empty = False
                    yield chain((first,), pieces)
        finally:
            self.repairs.log()
        if is_empty:
            described = ", ".join(f"{name} {value}" for name, value in self.describe().items())
            raise KeyreduceError(f"the text is empty ({described}); give other text with `text` or `dataset`")


class StdlibText(TextSource):
    """One split of the Python standard library's source, the default."""

    def __init__(self, split: Split):
        self.split: Split = split

    def describe(self) -> dict:
        return {"kind": "stdlib", "split": self.split, "python": platform.python_version()}

    def _content(self) -> dict:
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in stdlib_files(self.split)]
        return {**self.describe(), "files": hashes}

    def _stream(self, seed: int | None) -> Iterator[Iterable[str]]:
        return shuffled(((document,) for document in stdlib_documents(self.split)), seed)


class FileText(TextSource):
    """Files, and those of folders at any depth.

    A .jsonl line is a document (its field ``text``), so is a .parquet row (its column ``text``); any other file is one.

    Raises:
        KeyreduceError: a path is missing, a link leads nowhere, a file's suffix is not supported, or a folder holds no
            supported file.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = [Path(path) for path in paths]
        self._files = {path: name for given in self.paths for path, name in _text_files(given)}

    def describe(self) -> dict:
        return {"kind": "files", "paths": [str(path) for path in self.paths], "files": len(self._files)}

    def _content(self) -> dict:
        files = [[name, path.stat().st_size, _sampled_hash(path)] for path, name in self._files.items()]
        return {"kind": "files", "files": files}

    def _stream(self, seed: int | None) -> Iterator[Iterable[str]]:
        files = list(self._files)
        if seed is not None:
            random.Random(seed).shuffle(files)
        return shuffled((document for path in files for document in _read(path, self.repairs)), seed)


class DatasetText(TextSource):
    """One split of a dataset that the ``datasets`` library loads by name, streamed; its column ``text``."""

    def __init__(self, name: str, config: str | None = None, split: str = "train"):
        self.name, self.config, self.split = name, config, split

    def describe(self) -> dict:
        return {"kind": "dataset", "name": self.name, "config": self.config, "split": self.split}

    def _stream(self, seed: int | None) -> Iterator[Iterable[str]]:
        import datasets

        try:
            rows = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise KeyreduceError(
                f"dataset {self.name!r} cannot be loaded, check `dataset`, `dataset_config` and `split`: {reason}"
            ) from error
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        return self._texts(rows)

    def _texts(self, rows: Iterable[object]) -> Iterator[Iterable[str]]:
        number = 0
        try:
            for number, row in enumerate(rows, start=1):
                if text := _text_of(row, f"dataset {self.name!r}, row {number} as drawn,", self.repairs):
                    yield (text,)
        except KeyreduceError:
            raise
        except Exception as error:
            # Which classes its readers raise depends on the format of the files.
            raise KeyreduceError(f"dataset {self.name!r} ended after {number:,} rows: {reason(error)}") from error


class DocumentText(TextSource):
    """Documents that are in memory already."""

    def __init__(self, documents: Sequence[str]):
        self._documents = list(documents)

    def describe(self) -> dict:
        return {"kind": "documents", "documents": len(self._documents)}

    def _content(self) -> dict:
        hashes = [hashlib.sha256(document.encode(errors="surrogatepass")).hexdigest() for document in self._documents]
        return {"kind": "documents", "documents": hashes}

    def _stream(self, seed: int | None) -> Iterator[Iterable[str]]:
        numbered = enumerate(self._documents, start=1)
        return shuffled(((self.repairs.text(text, f"document {number}"),) for number, text in numbered), seed)


def text_source(
    paths: Sequence[Path] = (),
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    *,
    default: Split,
) -> TextSource:
    """Return the text that a request's fields ask for; without any, the ``default`` split of the standard library.

    Raises:
        KeyreduceError: the options contradict each other, or a path is refused by `FileText`.
    """
    if paths and dataset:
        raise KeyreduceError("`text` and `dataset` are both given; give one of them")
    if dataset:
        return DatasetText(dataset, dataset_config, split or "train")
    if dataset_config or split:
        raise KeyreduceError("`dataset_config` and `split` say which part of a `dataset`; give its name too")
    return FileText(paths) if paths else StdlibText(default)


def _text_files(given: Path) -> list[tuple[Path, str]]:
    """List the files that a path stands for, each with its name below that path."""
    supported = ", ".join(_READERS)
    if given.is_file():
        if given.suffix.lower() not in _READERS:
            raise KeyreduceError(f"{given} is of no kind that is read; give one of {supported}, or a folder of them")
        return [(given, given.name)]
    if not given.is_dir():
        raise KeyreduceError(dangling_link(given) or f"there is no text file or folder {given}")
    found = sorted(path for path in given.rglob("*") if path.suffix.lower() in _READERS)
    for path in found:
        if message := dangling_link(path):
            raise KeyreduceError(message)
    found = [path for path in found if path.is_file()]
    if not found:
        raise KeyreduceError(f"folder {given} holds no text file; the kinds that are read are {supported}")
    return [(path, path.relative_to(given).as_posix()) for path in found]


def _read(path: Path, repairs: Repairs) -> Iterator[Iterable[str]]:
    with _reading(path):
        yield from _READERS[path.suffix.lower()](path, repairs)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a file may do to its reader into one line."""
    try:
        yield
    except UnicodeDecodeError:
        raise KeyreduceError(f"{path} is not UTF-8 text; convert it, or leave it out") from None
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror or error}") from None


class _PlainFile:
    """A file that is one document; it is opened when its pieces are taken, so that it can wait to be shuffled."""

    def __init__(self, path: Path, repairs: Repairs):
        self._path, self._repairs = path, repairs

    def __iter__(self) -> Iterator[str]:
        with _reading(self._path), self._path.open(encoding="utf-8") as file:
            is_counted = False
            while piece := file.read(_PIECE):
                if "\0" in piece and not is_counted:
                    is_counted = True
                    self._repairs.add(_NULS, str(self._path))
                yield piece.replace("\0", "")


def _read_plain(path: Path, repairs: Repairs) -> Iterator[Iterable[str]]:
    yield _PlainFile(path, repairs)


def _read_jsonl(path: Path, repairs: Repairs) -> Iterator[Iterable[str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number},"
            if b"\0" in line:  # which no JSON holds: a file system leaves them where a write was cut off
                repairs.add(_NULS, where.rstrip(","))
                line = line.replace(b"\0", b"")
            if not line.strip():
                continue
            try:
                # Whole numbers are not looked at, and those of thousands of digits would be refused.
                row = json.loads(line, parse_int=float)
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise KeyreduceError(f"{where} is not JSON; each line must be a JSON object") from None
            except RecursionError:
                raise KeyreduceError(f"{where} is nested too deeply to be read; leave that line out") from None
            yield (_text_of(row, where, repairs),)


def _read_parquet(path: Path, repairs: Repairs) -> Iterator[Iterable[str]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if TEXT_FIELD not in columns:
                raise KeyreduceError(
                    f'{path} has no column "{TEXT_FIELD}" but {", ".join(columns)}; rename the one with the text'
                )
            batches = file.iter_batches(batch_size=256, columns=[TEXT_FIELD])
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
                yield (_text_of(row, f"{path}, row {number},", repairs),)
    except pyarrow.ArrowInvalid:
        raise KeyreduceError(f"{path} is not a parquet file, or is truncated") from None


_READERS: dict[str, Callable[[Path, Repairs], Iterator[Iterable[str]]]] = dict.fromkeys(
    (".txt", ".md", ".py"), _read_plain
)
_READERS |= {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _text_of(row: object, where: str, repairs: Repairs) -> str:
    """Return a row's text, mended; the empty one where it is null, as in tables that were joined."""
    text = row.get(TEXT_FIELD, 0) if isinstance(row, dict) else None
    if isinstance(row, dict) and text is None:
        repairs.add(_NULL, where.rstrip(","))
        return ""
    if not isinstance(text, str):
        raise KeyreduceError(f'{where} has no string in the field "{TEXT_FIELD}"; put the document there')
    return repairs.text(text, where.rstrip(","))


def shuffled(documents: Iterable[_Any], seed: int | None) -> Iterator[_Any]:
    """Yield the documents in an order drawn through a buffer of bounded length, as `datasets` shuffles a stream."""
    documents = iter(documents)
    if seed is None:
        yield from documents
        return
    generator = random.Random(seed)
    buffer = list(islice(documents, _SHUFFLE_BUFFER))
    for document in documents:
        place = generator.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = document
    generator.shuffle(buffer)
    yield from buffer


def _sampled_hash(path: Path) -> str:
    """Hash the beginning, the middle and the end of a file, which may be larger than one wants to read."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, (size - _SAMPLE_BYTES) // 2, size - _SAMPLE_BYTES):
            file.seek(max(start, 0))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()

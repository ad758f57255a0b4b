"""Records, with their places, from JSONL, Parquet and text files or from a data set named on the hub."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmlora_dist.errors import DataError
from ssmlora_dist.progress import progress
from ssmlora_dist.records import Record, nearest_name


def read_records(
    *,
    path: str | Sequence[str] | None = None,
    hub: str | None = None,
    subset: str | None = None,
    split: str = "train",
    streaming: bool = False,
    limit: int | None = None,
    skip: int = 0,
) -> Iterator[Record]:
    """Reads the records of files or of a hub data set, one at a time and in order.

    Args:
        path: a file, a glob or a list of these; the suffix says what it holds. `.jsonl`: an object per line;
            `.parquet`: a record per row; `.txt`: one document, in the field `text`.
        hub: the name of a data set for `datasets.load_dataset`, instead of `path`.
        subset: the hub data set's configuration.
        split: the hub data set's split, slices such as `train[:1000]` included unless it is streamed.
        streaming: read the hub data set while it is downloaded.
        limit: the most records to read.
        skip: how many of these to leave out, the first ones.

    Raises:
        DataError: a file is missing, empty, of an unknown kind or corrupt (with its line); the hub data set
            cannot be had.
    """
    if hub is not None:
        records = _read_hub(hub, subset, split, streaming)
    else:
        files = find_files([path] if isinstance(path, str) else list(path or ()))
        records = itertools.chain.from_iterable(map(_read_file, files))
    return itertools.islice(records, skip, limit)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs name: globs sorted, paths in the order given.

    Raises:
        DataError: a path or glob matches no file, or a file is of an unknown kind.
    """
    files: list[Path] = []
    for pattern in patterns:
        # A name that exists wins over its reading as a glob: brackets are common in file names.
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            parent = Path(pattern).parent
            siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
            near = nearest_name(Path(pattern).name, siblings)
            raise DataError(
                f"{pattern}: no such file{near}; paths are taken from the directory of the command"
            )
        files.extend(map(Path, found))
    for file in files:
        if file.is_dir():
            raise DataError(f"{file}: is a directory; name its files, for example {file}/*.jsonl")
        if file.suffix.lower() not in READERS:
            raise DataError(
                f"{file}: unknown kind of file; convert it to one whose suffix is {', '.join(READERS)}"
            )
    return files


def _read_file(file: Path) -> Iterator[Record]:
    is_empty = True
    try:
        for record in READERS[file.suffix.lower()](file):
            is_empty = False
            yield record
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror or error}); mend its access rights or name another"
        ) from None
    if is_empty:
        raise DataError(f"{file}: holds no records; fill it or take it out of the list")


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                # JSON can name half of a surrogate pair, which is no text that a tokenizer takes.
                if rb"\ud" in line.lower():
                    json.dumps(values, ensure_ascii=False).encode()
            except UnicodeError:
                raise DataError(f"{place}: is not valid UTF-8 text; convert the file to UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: is not valid JSON ({error}); mend or remove the line") from None
            if not isinstance(values, dict):
                raise DataError(
                    f"{place}: holds a {type(values).__name__}, but each line must be a JSON object with "
                    "named fields; mend or remove the line"
                )
            yield Record(values, place)


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = (row for batch in parquet.ParquetFile(file).iter_batches() for row in batch.to_pylist())
        for number, values in enumerate(rows, start=1):
            yield Record(values, f"{file}: row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{file}: is not a readable Parquet file ({_first_line(error)}); write it again"
        ) from None


def _read_text(file: Path) -> Iterator[Record]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        line = file.read_bytes()[: getattr(error, "start", 0)].count(b"\n") + 1
        raise DataError(f"{file}:{line}: is not valid UTF-8 text; convert the file to UTF-8") from None
    if text.strip():
        yield Record({"text": text}, str(file), is_document=True)


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _read_hub(hub: str, subset: str | None, split: str, streaming: bool) -> Iterator[Record]:
    name = hub if subset is None else f"{hub} ({subset})"
    rows: Any = _load_hub(hub, subset, split, streaming, name)
    number = 0
    try:
        for number, values in enumerate(rows, start=1):
            yield Record(values, f"{name}, split {split}: row {number}")
    # Of a stream, which meets with whatever is wrong on the way, as an error of any of several libraries.
    except Exception as error:
        raise DataError(
            f"{name}, split {split}: the row after {number} cannot be read ({type(error).__name__}: "
            f"{_first_line(error)}); check the connection to the hub, or save the data as JSONL or Parquet "
            "and name it in `path`"
        ) from None
    if number == 0:
        raise DataError(f"{name}: split {split!r} holds no records; name another split")


def _load_hub(hub: str, subset: str | None, split: str, streaming: bool, name: str) -> Any:
    import datasets

    try:
        with progress(f"fetching {name} from the hub"):
            return datasets.load_dataset(hub, subset, split=split, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError:
        raise DataError(
            f"{name}: no such data set on the hub, or a private one; check `hub`, or use `hf auth login`"
        ) from None
    except ValueError as error:
        # The library says which subsets and splits there are.
        raise DataError(f"{name}: {_first_line(error)}; check `subset` and `split`") from None
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: cannot be loaded ({type(error).__name__}: {_first_line(error)}); check the connection "
            "to the hub, or save the data as JSONL or Parquet and name it in `path`"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".;!")

"""Records, with their places, from JSONL, Parquet and text files or from a data set named on the hub."""

from __future__ import annotations

import functools
import glob
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssmlora_dist.data.contents import unreadable
from ssmlora_dist.errors import DataError
from ssmlora_dist.progress import progress
from ssmlora_dist.records import Record, nearest_name
from ssmlora_dist.tokenization import check_text

_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_records(
    *,
    path: str | Sequence[str] | None = None,
    hub: str | None = None,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> Iterator[Record]:
    """Reads the records of files or of a hub data set, one at a time and in order.

    Numbers that are not finite are missing values: tables of floats have no other, and JSON has none of them.

    Args:
        path: a file, a glob or a list of these; the suffix says what it holds. `.jsonl`: an object per line;
            `.parquet`: a record per row; `.txt`: one document, in the field `text`.
        hub: the name of a data set for `datasets.load_dataset`, instead of `path`.
        subset: the hub data set's configuration.
        split: the hub data set's split, slices such as `train[:1000]` included unless it is streamed.
        revision: the hub data set's branch, tag or commit.
        streaming: read the hub data set while it is downloaded.
        limit: the most records to read.

    Raises:
        DataError: a file is missing, empty, of an unknown kind or corrupt (with its line); the hub data set
            cannot be had.
    """
    if hub is not None:
        records = _read_hub(hub, subset, split, revision, streaming)
    else:
        files = find_files([path] if isinstance(path, str) else list(path or ()))
        records = itertools.chain.from_iterable(map(_read_file, files))
    finite = (Record(_finite(record.values), record.where) for record in records)
    return itertools.islice(finite, limit)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs name: globs sorted, paths in the order given.

    Raises:
        DataError: a path or glob matches no file, or a file is of an unknown kind.
    """
    files: list[Path] = []
    for pattern in patterns:
        # A name that exists wins over its reading as a glob: brackets are common in file names.
        try:
            found = [pattern] if _exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            parent = Path(pattern).parent
            siblings = [entry.name for entry in parent.iterdir()] if not found and parent.is_dir() else []
        except OSError as error:
            raise DataError(
                f"{pattern}: cannot be looked for ({error.strerror}); name another file, or mend its access "
                "rights"
            ) from None
        if not found:
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


def _finite(value: Any) -> Any:
    """The value with None for every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    # Tables have pairs as tuples.
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def _exists(path: str) -> bool:
    """As `Path.exists`, which takes some of what the system refuses for nothing there."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _read_file(file: Path) -> Iterator[Record]:
    is_empty = True
    try:
        for record in READERS[file.suffix.lower()](file):
            is_empty = False
            yield record
    except OSError as error:
        raise unreadable(file, error) from None
    if is_empty:
        raise DataError(f"{file}: holds no records; fill it or take it out of the list")


# How a file begins that is one JSON document: an array of objects, or a first line that opens and no more.
JSON_DOCUMENT = re.compile(rb"(\xef\xbb\xbf)?\s*(\[\s*(\{|\]|$)|\{\s*$)")


def _read_jsonl(file: Path) -> Iterator[Record]:
    is_first = True
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            if is_first and JSON_DOCUMENT.match(line):
                raise DataError(
                    f"{where}: begins as one JSON document, such as an array, but a .jsonl file has a JSON "
                    'object on each line; write it anew, for example with python -c "import json, sys; '
                    '[print(json.dumps(row)) for row in json.load(sys.stdin)]" < OLD > NEW.jsonl'
                )
            is_first = False
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                values = json.loads(text, object_pairs_hook=functools.partial(_object, where))
                # JSON can name half of a surrogate pair, which is no text that a tokenizer takes.
                if rb"\ud" in line.lower():
                    check_text(json.dumps(values, ensure_ascii=False), where)
            except UnicodeError:
                raise DataError(f"{where}: is not valid UTF-8 text; convert the file to UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: is not valid JSON ({error}); mend or remove the line") from None
            if not isinstance(values, dict):
                raise DataError(
                    f"{where}: holds a {type(values).__name__}, but each line must be a JSON object with "
                    "named fields; mend or remove the line"
                )
            yield Record(values, where)


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python's reader would keep the last value of every name without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        _refuse_twice([name for name, _ in pairs], where)
    return values


def _refuse_twice(names: Sequence[str], where: str) -> None:
    name = next((name for name in names if names.count(name) > 1), None)
    if name is not None:
        raise DataError(f"{where}: has the field {name!r} more than once; rename or remove all but one")


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        _refuse_twice(table.schema_arrow.names, str(file))
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        for number, values in enumerate(rows, start=1):
            yield Record(values, f"{file}: row {number}")
    except (pyarrow.ArrowException, UnicodeError, OSError) as error:
        # What the operating system refuses has a number; the library has such errors without one.
        if isinstance(error, OSError) and error.errno is not None:
            raise
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
        yield Record({"text": text}, str(file))


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def resolve_revision(hub: str, subset: str | None, revision: str | None) -> str | None:
    """The commit that a branch, a tag or (None) the default branch of a hub data set stands for now.

    Without a connection it is that of the copy in the cache. A directory in place of a hub name has none.

    Raises:
        DataError: the data set cannot be had, or not in this revision.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    name = _named(hub, subset)
    with _explained(name):
        builder = datasets.load_dataset_builder(hub, subset, revision=revision)
    commit = builder.hash if _COMMIT.fullmatch(builder.hash or "") else None
    if revision is None or commit == revision:
        return commit
    if commit is None:
        raise DataError(
            f"{name}: is no data set on the hub, so it has no revision {revision!r}; leave it out"
        )
    # The library takes what it finds in its cache, of any revision.
    if isinstance(builder, Cache) and commit != _cached_commit(hub, revision):
        raise DataError(
            f"{name}: the hub cannot be reached, and the newest copy in the cache is of commit {commit}, not "
            f"known to be of revision {revision!r}; restore the connection, or name that commit"
        )
    return commit


def _cached_commit(hub: str, revision: str) -> str | None:
    """What a branch or tag stood for when its data set was last downloaded."""
    from huggingface_hub import try_to_load_from_cache

    readme = try_to_load_from_cache(hub, "README.md", repo_type="dataset", revision=revision)
    return Path(readme).parent.name if isinstance(readme, str) else None


def _named(hub: str, subset: str | None) -> str:
    return hub if subset is None else f"{hub} ({subset})"


def _read_hub(
    hub: str, subset: str | None, split: str, revision: str | None, streaming: bool
) -> Iterator[Record]:
    import datasets

    name = _named(hub, subset)
    with _explained(name):
        rows: Any = datasets.load_dataset(hub, subset, split=split, revision=revision, streaming=streaming)
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


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what the library raises for a data set into an error of ours."""
    import datasets

    try:
        with progress(f"fetching {name} from the hub"):
            yield
    except datasets.exceptions.DatasetNotFoundError as error:
        if "Revision" in str(error):
            raise DataError(f"{name}: {_first_line(error)}; name a branch, tag or commit") from None
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

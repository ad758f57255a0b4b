"""Which MLflow store and experiment a run is recorded in, and what is wrong with them at first sight."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_EXPERIMENT = "ssmlora_dist"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
NAME_VARIABLE, ID_VARIABLE = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
# Of MLflow's own.
MAX_EXPERIMENT_NAME_LENGTH = 500

_DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]*)(?P<options>\?.*)?", re.DOTALL)
_SQLITE_HEADER = b"SQLite format 3\0"
_FORMS = "a server (http://HOST:PORT), a file (sqlite:///FILE or sqlite:////FILE from the root) or a database"


@dataclass(frozen=True)
class Store:
    """Where a run is recorded.

    Attributes:
        uri: MLflow's tracking URI.
        uri_from: the key or variable that it follows from.
        experiment: name of the experiment; None where its number alone is known.
        experiment_from: the key or variable that names it; `tracking.experiment` by default too.
        experiment_id: number of the experiment, of one that must exist.
        output_dir: holds the artifacts of a database elsewhere.
    """

    uri: str
    uri_from: str
    experiment: str | None
    experiment_from: str
    experiment_id: str | None
    output_dir: Path

    @property
    def shown_uri(self) -> str:
        """The URI without its password."""
        return without_credentials(self.uri)

    @property
    def sqlite_file(self) -> Path | None:
        """The file of a sqlite store."""
        found = _SQLITE.fullmatch(self.uri)
        return Path(found["path"]) if found and found["path"] not in ("", ":memory:") else None

    @property
    def artifact_location(self) -> str | None:
        """Of a new experiment: a folder beside the database, or what a server chooses.

        Without one MLflow would write into the current directory.
        """
        if not self.uri.startswith(_DATABASE_SCHEMES):
            return None
        file = self.sqlite_file
        return ((file.resolve().parent if file else self.output_dir.resolve()) / "mlartifacts").as_uri()

    def __str__(self) -> str:
        name = json.dumps(self.experiment, ensure_ascii=False) if self.experiment else self.experiment_id
        return f"{self.shown_uri} ({self.uri_from}), experiment {name} ({self.experiment_from})"

    def record(self) -> dict[str, Any]:
        """What was chosen and why, in JSON types."""
        return {
            "uri": self.shown_uri,
            "uri_from": self.uri_from,
            "experiment": self.experiment or self.experiment_id,
            "experiment_from": self.experiment_from,
        }

    def problem(self) -> str | None:
        """What is wrong with URI, file or name of the experiment, in a line; nothing is made or written."""
        if self.experiment and (length := len(self.experiment)) > MAX_EXPERIMENT_NAME_LENGTH:
            allowed = f"allowed: at most {MAX_EXPERIMENT_NAME_LENGTH}; shorten it"
            return f"{self.experiment_from}: a name of {length} characters given; {allowed}"
        try:
            found = self._problem()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            found = f"cannot be used ({reason}); allowed: {_FORMS}; correct it"
        if found is None:
            return None
        given = self.shown_uri if len(self.shown_uri) <= 200 else f"{self.shown_uri[:197]}..."
        return f"{self.uri_from}: {json.dumps(given, ensure_ascii=False)} {found}"

    def _problem(self) -> str | None:
        if "\0" in self.uri:
            return "has a null character, which no name has; remove it"
        scheme = self.uri.partition(":")[0].lower()
        if scheme.startswith("sqlite") and ":" in self.uri:
            return self._sqlite_problem()
        if scheme in ("http", "https"):
            parts = urlsplit(self.uri)
            # Reading the port checks it.
            if not parts.hostname or parts.port == 0:
                return "names no host; write http://HOST:PORT"
        return None

    def _sqlite_problem(self) -> str | None:
        found = _SQLITE.fullmatch(self.uri)
        if found is None:
            return "given; allowed: sqlite:///FILE, or sqlite:////FILE from the root; write it so"
        is_default = self.uri_from == "run.output_dir"
        if is_default and found["options"]:
            return (
                "has a `?`, where the path of a sqlite store ends; rename the directory or set tracking.uri"
            )
        if found["options"] and not re.fullmatch(r"\?\w+=[^/]*", found["options"]):
            return "has a `?`, where the path ends and options begin; rename what the path names"
        if code := re.search("%[0-9A-Fa-f]{2}", found["path"]):
            what = "rename the directory or set tracking.uri" if is_default else "write the character itself"
            return f"has {code[0]}, which stands for another character in a URI; {what}"
        file = self.sqlite_file
        if file is None:
            return "keeps runs in memory, so that they are lost at the end; name a file: sqlite:///FILE"
        if file.parts[0].startswith("~"):
            return f"begins with {file.parts[0]}, but no such user is known here; write the path out"
        if not file.exists():
            parent = next(parent for parent in file.absolute().parents if parent.exists())
            if not parent.is_dir():
                return f"cannot be made: {parent} is a file; name another place"
            return (
                None if os.access(parent, os.W_OK | os.X_OK) else f"cannot be made: {parent} is not writable"
            )
        if not file.is_file():
            return f"is a directory; name a file in it: {self.uri.rstrip('/')}/mlflow.db"
        if not os.access(file, os.R_OK | os.W_OK):
            return "is a file that cannot be written; change its permissions or name another"
        if not os.access(file.absolute().parent, os.W_OK | os.X_OK):
            return "lies in a directory that cannot be written, as SQLite needs it; change its permissions"
        with file.open("rb") as opened:
            header = opened.read(len(_SQLITE_HEADER))
        return (
            "is a file that holds no SQLite database; name another"
            if header not in (b"", _SQLITE_HEADER)
            else None
        )


def choose_store(
    output_dir: Path,
    uri: str | None = None,
    experiment: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Store:
    """The store and experiment to record in: those of the configuration, else MLflow's variables', else ours.

    Args:
        output_dir: holds `mlflow.db` and `mlartifacts/` where nothing else is said.
        uri: `tracking.uri`: a server or database; authentication comes from MLflow's variables.
        experiment: `tracking.experiment`.
        environment: with MLflow's variables.
    """
    told = environment.get(URI_VARIABLE)
    chosen, uri_from = (uri, "tracking.uri") if uri else (told, URI_VARIABLE)
    if not chosen:
        chosen, uri_from = f"sqlite:///{output_dir.resolve() / 'mlflow.db'}", "run.output_dir"
    head, home, rest = chosen.partition(":///~")
    if home and head.startswith("sqlite"):
        chosen = f"{head}:///{os.path.expanduser(f'~{rest}')}"
    name, number = environment.get(NAME_VARIABLE) or None, environment.get(ID_VARIABLE) or None
    if experiment is not None:
        name, number, experiment_from = experiment, None, "tracking.experiment"
    elif number is not None:
        experiment_from = ID_VARIABLE
    elif name is not None:
        experiment_from = NAME_VARIABLE
    else:
        name, experiment_from = DEFAULT_EXPERIMENT, "tracking.experiment"
    return Store(chosen, uri_from, name, experiment_from, number, output_dir)


def without_credentials(text: str) -> str:
    """`text` without the passwords of its URIs."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)

"""Checkpoint files: written whole or not at all, verified before they are read, free of code.

A checkpoint is a zip archive of `torch.save` that holds plain tensors and numbers only; any tool
opens it with `torch.load(path, weights_only=True)`. The SHA-256 of the archive stands in the
comment at its end, a place that every zip reader knows and skips.
"""

import errno
import hashlib
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from image_classification.checkpoint.state import require_plain

FORMAT = 1
BEST = "model_best.pth.tar"

_DIGEST_MARK = b"sha256:"
_TRAILER_SIZE = 2 + len(_DIGEST_MARK) + 64  # length of the comment, the comment
_EPOCH_FILE = re.compile(r"checkpoint_(\d{4,})\.pth\.tar")
_LONGEST_NAME = 240  # bytes; file systems take 255, and a name may get ".previous" or ".tmp"
_REQUIRED_KEYS = ("format", "epoch", "state_dict")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


@dataclass(frozen=True)
class Found:
    """The newest intact checkpoint of a directory (None: there is no checkpoint at all)."""

    path: Path | None
    warnings: tuple[str, ...] = ()


def save(
    directory: Path,
    state: Mapping[str, Any],
    *,
    epoch: int,
    is_best: bool,
    filename: str = "checkpoint.pth.tar",
    keep: int = 0,
) -> Path:
    """Write `state` as the newest checkpoint of `directory` and return its path.

    The data are written once, to a temporary file that replaces `filename` only when it is safe on
    the disk: at any moment, a complete checkpoint is there. The other names are links to the same
    data: the checkpoint that stood there before stays as `<filename stem>.previous.pth.tar`, the
    best one is `model_best.pth.tar`, and those of single epochs are `checkpoint_<epoch>.pth.tar`.

    Args:
        directory: made when it is missing.
        state: names -> tensors, numbers, strings, and lists, tuples and dicts of them. `format` is
            added here; `epoch` and `state_dict` must be there.
        epoch: number in the name of the epoch's file, at least four digits.
        is_best: also keep this one as `model_best.pth.tar`.
        filename: name of the newest checkpoint.
        keep: number of epoch files to keep, the most recently written ones; 0 writes none, -1
            keeps all.

    Raises:
        OSError: in one line, why it could not be written and what is left; training may go on.
        TypeError: `state` holds something that only code could rebuild; the key is named.
    """
    state = _plain(state)
    target = directory / filename
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(target, state, keep_previous=True)
        if keep != 0:
            epoch_file = directory / f"checkpoint_{epoch:04}.pth.tar"
            _link(target, epoch_file)
            _prune(directory, keep, newest=epoch_file)
        if is_best:
            _link(target, directory / BEST)
        _sync_directory(directory)
    except OSError as error:
        left = f"{target} is intact" if os.path.exists(target) else "none is there yet"
        reason = error.strerror or error
        raise OSError(f"cannot write a checkpoint in {directory}: {reason}; {left}") from error
    return target


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to one file, which is whole or not there, in the place of what was there.

    Raises:
        OSError: why it could not be written.
        TypeError: as `save` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, _plain(state), keep_previous=False)


def load(path: Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint after its digest was verified; nothing in the file is executed.

    Raises:
        ValueError: in one line, the file is missing, unreadable, damaged, of another program or of
            a later format, or holds pickled code.
    """
    verify(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds pickled objects that only code could rebuild and is refused: "
            "use a checkpoint that this trainer wrote"
        ) from error
    missing = [key for key in _REQUIRED_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this trainer: it has no '{missing[0]}'")
    if state["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}: "
            "use the version of the trainer that wrote it"
        )
    return dict(state)


def verify(path: Path) -> None:
    """Compare the file with the digest that it carries, reading it once.

    Raises:
        ValueError: in one line, the file is missing, unreadable, damaged or carries no digest.
    """
    try:
        with path.open("rb") as file:
            recorded, computed = _digests(file)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: name an existing checkpoint") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if recorded == computed:
        return
    if recorded is None and not _is_cut(path):
        raise ValueError(
            f"{path} was not written by this trainer (it carries no digest): "
            "bring it in with python -m cli.convert"
        )
    raise ValueError(
        f"{path} is truncated or damaged: its content does not match its digest; "
        "use an earlier checkpoint"
    )


def find(directory: Path, filename: str = "checkpoint.pth.tar") -> Found:
    """Find the newest intact checkpoint of a run, for a resume without a named file.

    Looks at `filename`, the one before it, the epoch files from the last to the first, and the
    best. A damaged one is passed over with a warning that names it and the one used instead.

    Raises:
        ValueError: there are checkpoints but none is intact; a run never starts afresh over them.
    """
    problems: list[str] = []
    seen: set[tuple[int, int]] = set()
    for path in _candidates(directory, filename):
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:  # another name of a file looked at already
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            verify(path)
        except ValueError as error:
            problems.append(str(error))
        else:
            return Found(path, tuple(f"{problem}; using {path}" for problem in problems))
    if problems:
        raise ValueError(f"no intact checkpoint in {directory}: {problems[0]}")
    return Found(None)


def check_names(filename: str, others: Mapping[str, str]) -> None:
    """Check the name that newest checkpoints are to have.

    Args:
        filename: As for `save`.
        others: Flag -> path, from the directory, of another file that a run writes.

    Raises:
        ValueError: One line: it is no plain name, or stands for another file of a run.
    """
    if Path(filename).name != filename or not 0 < len(os.fsencode(filename)) <= _LONGEST_NAME:
        raise ValueError(
            f"--checkpoint-filename {filename!r} must be a plain file name of at most "
            f"{_LONGEST_NAME} bytes; --workspace names the directory"
        )
    if filename == BEST or _EPOCH_FILE.fullmatch(filename):
        raise ValueError(
            f"--checkpoint-filename {filename} is the name of the best checkpoint or of that of an "
            "epoch: choose another"
        )
    taken = filename, _previous(Path(filename)).name, BEST
    for flag, path in others.items():
        if os.path.normpath(path) in (".", *taken):
            raise ValueError(
                f"{flag} {path!r} is no name of its own for a file beside {', '.join(taken)}: "
                "choose another"
            )


def newest(directory: Path, filename: str = "checkpoint.pth.tar") -> Path | None:
    """Return the first checkpoint that `find` would look at, or None if there is none."""
    return next(iter(_candidates(directory, filename)), None)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what goes into the file."""
    state = {**state, "format": FORMAT}
    for key, value in state.items():
        require_plain(value, key)
    return state


def _write(target: Path, state: dict[str, Any], *, keep_previous: bool) -> None:
    """Put `state` in the place of `target`, whose former content may become the previous one."""
    temporary = target.with_name(f".{target.name}.tmp")  # one name, so that a crash leaves one file
    try:
        with temporary.open("wb") as file:
            stream = _DigestingStream(file)
            torch.save(state, cast(BinaryIO, stream))
            stream.finish()
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and target.exists():
            _link(target, _previous(target))
        temporary.replace(target)
        _sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


class _DigestingStream:
    """The file that torch.save writes to: digests what passes and holds the first error back.

    An error inside a write would surface as an internal error of the archive writer, which names no
    cause. Therefore the first error is kept and raised by `finish`, with its own message.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: memoryview) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
            self._digest.update(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: the file is flushed once, when it is complete."""

    def finish(self) -> None:
        """Add the digest as the archive's comment, or raise the error that was held back."""
        if self._error is not None:
            raise self._error
        comment = _DIGEST_MARK + self._digest.hexdigest().encode()
        self._file.seek(-2, os.SEEK_END)  # the length of the comment, so far 0
        self._file.write(struct.pack("<H", len(comment)) + comment)


def _digests(file: BinaryIO) -> tuple[bytes | None, bytes]:
    """Return the digest that a file carries (None if it has none) and that of its content."""
    size = file.seek(0, os.SEEK_END)
    body_size = max(size - _TRAILER_SIZE, 0)
    file.seek(body_size)
    trailer = file.read()
    file.seek(0)
    digest = hashlib.sha256()
    while body_size > 0:
        block = file.read(min(body_size, 1 << 20))
        if not block:
            break
        digest.update(block)
        body_size -= len(block)
    digest.update(b"\0\0")  # the archive was digested when it had no comment yet
    expected_start = struct.pack("<H", _TRAILER_SIZE - 2) + _DIGEST_MARK
    recorded = trailer.removeprefix(expected_start) if trailer.startswith(expected_start) else None
    return recorded, digest.hexdigest().encode()


def _is_cut(path: Path) -> bool:
    """Tell an archive that lost its end from a whole file of another program."""
    with path.open("rb") as file:
        begins_as_archive = b"PK".startswith(file.read(2))
        file.seek(max(path.stat().st_size - 2, 0))
        # torch writes no comment: the last field, its length, is 0.
        is_whole = file.read() == b"\0\0" and zipfile.is_zipfile(path)
    return begins_as_archive and not is_whole


def _previous(target: Path) -> Path:
    stem, dot, suffixes = target.name.partition(".")
    return target.with_name(f"{stem}.previous{dot}{suffixes}")


def _epoch_files(directory: Path) -> dict[Path, int]:
    """Return the epoch files of a directory with their numbers."""
    matches = {path: _EPOCH_FILE.fullmatch(path.name) for path in directory.iterdir()}
    return {path: int(match[1]) for path, match in matches.items() if match}


def _candidates(directory: Path, filename: str) -> list[Path]:
    if not directory.is_dir():
        return []
    epochs = _epoch_files(directory)
    last = directory / filename
    ordered = [last, _previous(last), *sorted(epochs, key=lambda p: -epochs[p]), directory / BEST]
    return [path for path in ordered if path.exists()]


def _prune(directory: Path, keep: int, *, newest: Path) -> None:
    """Remove all but the `keep` most recently written epoch files."""
    if keep < 0:
        return
    # By age, not by number: files of a longer earlier run may stand in the same directory.
    epochs = _epoch_files(directory)
    by_age = sorted(epochs, key=lambda p: (p == newest, p.stat().st_mtime_ns, epochs[p]))
    for path in by_age[:-keep]:
        path.unlink()


def _link(source: Path, name: Path) -> None:
    """Make `name` refer to the data of `source`, atomically; copy where links do not exist."""
    temporary = name.with_name(".checkpoint-link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(name)
    finally:
        # Renaming one link of a file over another does nothing and leaves both.
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not know this call; their renames are durable by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

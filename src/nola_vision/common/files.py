"""Files written whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
import uuid
from pathlib import Path

from nola_vision.common.errors import NolaVisionError

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")  # in timm's order of preference


# The process's own streams by name. Opened again they may be a file that was redirected to, which would be truncated.
_STREAMS = {
    **{name: 1 for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")},
    **{name: 2 for name in ("/dev/stderr", "/dev/fd/2", "/proc/self/fd/2")},
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def write_file(path: str | Path, content: bytes) -> None:
    """Writes a file that the user named: as `write_whole`, or directly to a stream (/dev/stdout), device or pipe.

    Raises:
        NolaVisionError: it cannot be written.
    """
    try:
        if (number := _STREAMS.get(str(path))) is not None:
            sys.stdout.flush()
            with open(number, "wb", closefd=False) as stream:
                stream.write(content)
        elif os.path.exists(path) and not os.path.isfile(path):
            Path(path).write_bytes(content)
        else:
            write_whole(os.path.realpath(path), content)  # a link that the user named keeps pointing to its file
    except OSError as error:
        reason, fix = error.strerror, "give another path"
        if os.path.isdir(path):
            reason, fix = "it is a folder", "give the path of a file"
        elif isinstance(error, FileNotFoundError):
            reason, fix = "its folder does not exist", "create it first"
        raise NolaVisionError(f"{path} cannot be written ({reason}): {fix}") from error


def why_not_a_file(path: str | Path) -> str:
    """Why a path is not one of a regular file, for a message: `does not exist`, `is a folder`, ..."""
    if os.path.isdir(path):
        return "is a folder"
    return "is not a regular file" if os.path.lexists(path) else "does not exist"


def need_room(error: BaseException | None, folder: Path) -> None:
    """Raises NolaVisionError if an error, or one that led to it, is that a disk is full or cannot be written to."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise NolaVisionError(
                f"{error.filename2 or error.filename or folder} cannot be written ({error.strerror}): free disk space, "
                "or give another --out, and repeat the command"
            ) from error
        error = error.__cause__ or error.__context__


def need_adapter_file(path: str | Path, shown: str | Path | None = None) -> None:
    """Raises NolaVisionError unless `path` is a regular file, not a pipe or a device. The message calls it `shown`."""
    if not os.path.isfile(path):
        raise NolaVisionError(
            f"the adapter file {shown or path} {why_not_a_file(path)}: give the path of a file that `fit` wrote"
        )


def need_folder_of(path: str | Path) -> None:
    """Raises NolaVisionError unless the folder that a file is to be written into exists."""
    if not Path(path).absolute().parent.is_dir():
        raise NolaVisionError(f"the folder of {path} does not exist: create it first")


def need_checkpoint_file(path: str | Path) -> None:
    """Raises NolaVisionError unless there is a file."""
    if not os.path.isfile(path):
        raise NolaVisionError(
            f"the checkpoint {path} {why_not_a_file(path)}: give one by --ckpt_path ('last' is that of a run with "
            "these very settings)"
        )


def weights_in(path: str | Path) -> Path:
    """A weights file, or the one in a folder, in timm's order of preference.

    Raises:
        NolaVisionError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for suffix in WEIGHTS_SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
        for file in (path / "model.safetensors", path / "pytorch_model.bin", *files):
            if file.is_file():
                return file
        raise NolaVisionError(f"the folder {path} holds no weights: it must have a file model.safetensors")
    if not path.is_file():
        raise NolaVisionError(
            f"the weights file {path} {why_not_a_file(path)}: give the path of a .safetensors or .pth file"
        )
    return path


def refuse_existing(path: Path, option: str | None = None) -> None:
    """Raises NolaVisionError if the path exists, so that a user's file is not overwritten."""
    if path.exists():
        kind = "is a folder" if path.is_dir() else "exists already"
        raise NolaVisionError(f"{path} {kind}: give another file{f' by {option}' if option else ''}")


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file atomically, through a temporary file next to it: readers see the old content or the new.

    A symbolic link at the path is replaced, not written through: the user did not choose where it points to.

    Raises:
        OSError: the folder is missing or cannot be written to, or the path is not that of a regular file. No
            temporary file remains.
    """
    path = Path(path)
    if os.path.lexists(path) and not path.is_symlink() and not path.is_file():  # a device would be replaced by a file
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder is gone; the first error is the one to report

"""Where control sockets lie: a folder that only its owner can write to. Used by both sides."""

import os
import stat
import tempfile
from pathlib import Path

from vlcache_connector.store.control.protocol import ControlError

VARIABLE = "VLCACHE_RUNTIME_DIR"


def chosen() -> Path:
    """The folder in which a server of this environment puts its socket."""
    return candidates()[0] if os.environ.get(VARIABLE) or os.environ.get("XDG_RUNTIME_DIR") else candidates()[-1]


def candidates() -> list[Path]:
    """Folders in which servers of this user may have put their sockets.

    The environments of a service and of a shell often differ in XDG_RUNTIME_DIR, so a client looks into all of them.
    """
    if folder := os.environ.get(VARIABLE):
        return [Path(folder)]
    runtime = [Path(f"/run/user/{os.geteuid()}")]
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        runtime.insert(0, Path(folder))
    folders = [folder / "vlcache" for folder in runtime if folder.is_dir()]
    folders.append(Path(tempfile.gettempdir()) / f"vlcache-{os.geteuid()}")
    return list(dict.fromkeys(folders))


def prepare() -> Path:
    """The folder for a new socket, made when it is missing. Raises `ControlError` when it cannot be trusted."""
    folder = chosen()
    try:
        folder.mkdir(mode=0o700, parents=bool(os.environ.get(VARIABLE)), exist_ok=True)
    except OSError as error:
        raise ControlError(f"cannot make {folder} ({error.strerror}); set {VARIABLE} to a folder of yours") from error
    require_private(folder)
    return folder


def require_private(folder: Path) -> None:
    """Raise `ControlError` unless nobody else could have put a socket into this folder."""
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode):
        problem = "is a link" if stat.S_ISLNK(state.st_mode) else "is not a folder"
    elif state.st_uid != os.geteuid():
        problem = f"belongs to user {state.st_uid}, not to {os.geteuid()}"
    elif state.st_mode & 0o022:
        problem = f"can be written to by others (mode {stat.S_IMODE(state.st_mode):04o})"
    else:
        return
    raise ControlError(f"{folder} {problem}; remove it or set {VARIABLE} to a folder that is yours alone")

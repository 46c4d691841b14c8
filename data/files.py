"""Find audio files on the disk."""
import os
from collections import Counter

from .audio import AUDIO_SUFFIXES

# Of a Synology, macOS and Windows; they contain thumbnails and the like under audio names.
SYSTEM_FOLDERS = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found",
                  "System Volume Information"}


def suffix(name: str) -> str:
    """Lower-case suffix with its dot, or ""."""
    return os.path.splitext(name)[1].lower()


def find_audio(root: str | os.PathLike, folder: str, ignored: Counter) -> list[str]:
    """List every path with an audio suffix below root/folder, relative to root, in no order.

    Hidden files and folders are skipped; links to folders are followed. Anything with an audio
    suffix is listed, also a pipe or a broken link: the scan says why it cannot be used.

    ignored: counts the suffixes of the other files. Raises OSError if a folder cannot be read.
    """
    paths = []
    waiting = [(folder, {_identity(root)})]  # folders to read, with the identities of those above
    while waiting:
        folder, above = waiting.pop()
        full_path = os.path.join(root, folder)
        identity = _identity(full_path)
        if identity in above:  # a link back to a folder that contains it
            continue
        with os.scandir(full_path) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}"
                if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                    continue
                if suffix(entry.name) in AUDIO_SUFFIXES:
                    paths.append(path)
                elif _is_folder(entry):
                    waiting.append((path, above | {identity}))
                else:
                    ignored[suffix(entry.name)] += 1
    return paths


def _identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry):
    if entry.is_symlink():
        return os.path.isdir(entry.path)  # entry.is_dir() would raise for a link to itself
    return entry.is_dir(follow_symlinks=False)

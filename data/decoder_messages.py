"""Catch what C libraries print on stderr, such as libmpg123, per thread.

They print through the C library's variable `stderr`. While a thread collects, that variable points
to a stream that hands each line to the thread that printed it. Python's own stderr is not touched.
On systems without glibc nothing is caught.
"""
import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
BY_CALLER = 2  # FSETLOCKING_BYCALLER of stdio_ext.h: no lock, which could meet Python's own
UNBUFFERED = 2  # _IONBF of stdio.h

_lock = threading.Lock()
_collectors = 0  # threads that collect at the moment
_texts = threading.local()  # .text: bytearray of this thread, None if it does not collect


class _Functions(ctypes.Structure):
    """cookie_io_functions_t of glibc; functions that are None do nothing."""
    _fields_ = [("read", ctypes.c_void_p), ("write", WRITE), ("seek", ctypes.c_void_p),
                ("close", ctypes.c_void_p)]


@WRITE
def _write(_, address, size):
    content = ctypes.string_at(address, size)
    text = getattr(_texts, "text", None)
    if text is None:
        with contextlib.suppress(OSError):
            os.write(2, content)
    elif len(text) < 1 << 16:  # a damaged file may cause millions of lines
        text += content
    return size


def _open_stream():
    """(libc, address of its variable stderr, our stream); None if that is not possible."""
    try:
        libc = ctypes.CDLL(None)
        variable = ctypes.c_void_p.in_dll(libc, "stderr")
        libc.fopencookie.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _Functions]
        libc.fopencookie.restype = ctypes.c_void_p
        libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        getattr(libc, "__fsetlocking").argtypes = [ctypes.c_void_p, ctypes.c_int]
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    stream = libc.fopencookie(None, b"w", _Functions(None, _write, None, None))
    if not stream:
        return None
    libc.setvbuf(stream, None, UNBUFFERED, 0)
    getattr(libc, "__fsetlocking")(stream, BY_CALLER)
    return variable, stream, variable.value


_stream = _open_stream()


@contextlib.contextmanager
def collect_messages(lines: list[str]) -> Iterator[None]:
    """Append what this thread's C code prints on stderr within the block to `lines`."""
    global _collectors
    if _stream is None or getattr(_texts, "text", None) is not None:  # not possible, or nested
        yield
        return
    variable, ours, original = _stream
    _texts.text = bytearray()
    with _lock:
        _collectors += 1
        variable.value = ours
    try:
        yield
    finally:
        with _lock:
            _collectors -= 1
            if _collectors == 0:
                variable.value = original
        text = bytes(_texts.text).decode(errors="replace")
        _texts.text = None
        lines += [" ".join(line.split()) for line in text.splitlines() if line.strip()]

"""What the benchmarks share: timing in turn, ratios with their range, the machine, the table."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from core.run.folder import describe_machine
from data.prepare import prepare


def in_turn(
    sides: dict[object, Callable], rounds: int, device: torch.device
) -> dict[object, list[float]]:
    """Call each side once per round, in turn -> {side: [seconds of each round]}.

    One round before them is not counted: it warms up.
    """
    times = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            seconds = timed(work, device)
            if number > 0:
                times[name].append(seconds)
        print(f"round {number}/{rounds} done", file=sys.stderr, flush=True)
    return times


def timed(work: Callable, device: torch.device) -> float:
    """Seconds of a call, until the GPU has finished too."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Return (median, smallest, largest)."""
    values = list(values)
    return statistics.median(values), min(values), max(values)


def median_range(values: Iterable[float], digits: int = 2) -> str:
    """"1.51 (1.44 to 1.58)": median and range."""
    median, low, high = spread(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratios(values: list[float], baseline: list[float]) -> list[float]:
    """Divide round by round."""
    return [value / base for value, base in zip(values, baseline, strict=True)]


def matrix_rate(device, dtype, rows: int = 776, inner: int = 768, columns: int = 3072) -> float:
    """Operations per second in a matrix product of this shape, the best of ten.

    This is the limit of the hardware. A multiplication and an addition count as two operations. On
    a GPU one product is over before the host has noticed, so a hundred are timed together.
    """
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    n_products = 100 if device.type == "cuda" else 1

    def multiply():
        for _ in range(n_products):
            a @ b

    seconds = min(timed(multiply, device) for _ in range(10)) / n_products
    return 2 * rows * inner * columns / seconds


def prepare_quietly(data: str, cache_dir: Path, headers_only: bool = False):
    """Find, scan and split recordings without printing -> Manifest."""
    scan_mode = "headers" if headers_only else "auto"
    manifest, _ = prepare(data, scan_mode=scan_mode, cache_dir=cache_dir, log=lambda line: None)
    return manifest


def report(name, settings: dict, columns: list[str], rows: list[list], notes: list[str], device,
           out: str | None) -> None:
    """Print a table and append it to a JSON lines file, with machine, versions and date."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())
    print("\n".join(notes))
    if not out:
        return
    result = {
        "benchmark": name, "date": time.strftime("%Y-%m-%d %H:%M"), "cpu": cpu_name(),
        **describe_machine(device), "settings": settings, "columns": columns, "rows": rows,
        "notes": notes,
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    for line in path.read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return ""

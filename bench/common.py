"""What the benchmarks share: sides timed in turn, ratios with their spread, the machine, the floor."""
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from core.run import describe_machine


def in_turn(sides, rounds, device):
    """Time each side (name -> function) once a round, in turn; a round before them warms up. -> {name: [seconds]}"""
    times = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            wait(device)
            started = time.perf_counter()
            work()
            wait(device)
            if number:
                times[name].append(time.perf_counter() - started)
        print(f"round {number}/{rounds} done", file=sys.stderr, flush=True)
    return times


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def spread(values):
    """(median, smallest, largest)"""
    return statistics.median(values), min(values), max(values)


def matrix_rate(device, dtype, rows=776, inner=768, columns=3072):
    """Operations a second in a matrix product of this shape, the best of ten: what the hardware gives."""
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * rows * inner * columns / best


def report(name, settings, columns, rows, notes, device, out):
    """Print a table and append the same to a JSON file, with machine, versions and date."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n".join(notes))
    if out:
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") \
            if Path("/proc/cpuinfo").exists() else platform.processor()
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps({
                "benchmark": name, "date": time.strftime("%Y-%m-%d %H:%M"), "cpu": cpu, **describe_machine(device),
                "settings": settings, "columns": columns, "rows": rows, "notes": notes}) + "\n")

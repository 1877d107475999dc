"""What was measured, for people."""

import os
import platform
from datetime import date


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_machine(rates: dict) -> None:
    print(f"{date.today()}, {_processor()}, {len(os.sched_getaffinity(0))} cores used, load {os.getloadavg()[0]:.1f} at the start")
    for cores, of in rates.items():
        print(
            f"  {cores} core{'s' * (cores != '1')}: dgemm {of['dgemm'] / 1e9:.1f} GF/s, tanh {1e9 / of['tanh']:.2f} ns an "
            f"element, copy {of['copy'] / 1e9:.1f} GB/s",
            flush=True,
        )


def print_size(found: dict) -> None:
    """One line a side: its times, its best over ours, its memory over ours."""
    nodes, rank, samples, layers = found["size"]
    print(f"\nN = {nodes}, rank {rank}, {samples} samples, {layers} layers")
    print(f"  {'':20}{'best s':>10}{'median s':>10}{'first s':>9}{'over ours':>11}{'peak MB':>9}{'over ours':>11}{'error':>10}")
    seconds, peak = found["seconds"], found["peak_bytes"]
    for name in (name for name in seconds if name != "fem_resnet"):
        ratios = ("", "")
        if "fem_resnet" in seconds:
            ratios = (f"{seconds[name] / seconds['fem_resnet']:.2f}", f"{peak[name] / max(peak['fem_resnet'], 1):.2f}")
        error = max(found["errors"][name]["a"], found["errors"][name]["beta"])
        print(
            f"  {name + ' *' * (name in found['inexact']):20}{seconds[name]:10.4f}{found['median_seconds'][name]:10.4f}"
            f"{found['first_call_seconds'][name]:9.2f}{ratios[0]:>11}{peak[name] / 1e6:9.1f}{ratios[1]:>11}{error:10.1e}"
        )
    for name, reason in found["failed"].items():
        print(f"  {name:20} not timed: {reason}")
    if found["inexact"]:
        print("  * its gradient is right to the order of the step only")
    roof = found["roofline"]
    work = roof["work"]
    print(
        f"  roofline: {work['flops'] / 1e9:.3g} GF, {work['sigmas'] / 1e6:.3g} million sigmas, {work['bytes'] / 1e9:.3g} GB; "
        f"bound {roof['bound_seconds']['1']:.4f} s on 1 core, {roof['bound_seconds']['2']:.4f} s on 2"
        + "".join(f"; {name} reaches {100 * part:.0f} %" for name, part in roof["fraction"].items()),
        flush=True,
    )

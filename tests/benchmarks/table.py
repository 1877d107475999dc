"""Tables of the measurements."""

import os
import platform
from datetime import date


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_machine(rates: dict) -> None:
    print(
        f"{date.today()}, {_processor()}, {len(os.sched_getaffinity(0))} cores used, "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )
    for cores, of in rates.items():
        print(
            f"  {cores} core{'s' * (cores != '1')}: dgemm {of['dgemm'] / 1e9:.1f} GF/s, tanh {1e9 / of['tanh']:.2f} ns an "
            f"element, copy {of['copy'] / 1e9:.1f} GB/s",
            flush=True,
        )


def print_size(found: dict) -> None:
    """One line a side: its times, its best over ours, its memory over ours."""
    nodes, rank, samples, layers = found["size"]
    alone = ", one side at a time" if found["one_at_a_time"] else ""
    print(f"\nN = {nodes}, rank {rank}, {samples} samples, {layers} layers{alone}")
    print(
        f"  {'':20}{'best s':>10}{'median s':>10}{'first s':>9}{'over ours':>10}{'peak MB':>9}{'over ours':>10}"
        f"{'eval. MB':>9}{'over ours':>10}{'error':>9}"
    )
    measured = [found["seconds"], found["peak_bytes"], found["evaluation_bytes"]]
    for name in (name for name in found["seconds"] if name in found["errors"]):
        seconds, peak, evaluation = (values[name] for values in measured)
        ratios = [f"{values[name] / values['fem_resnet']:.2f}" if values.get("fem_resnet") else "" for values in measured]
        error = max(found["errors"][name]["a"], found["errors"][name]["beta"])
        print(
            f"  {name + ' *' * (name in found['inexact']):20}{seconds:10.5f}{found['median_seconds'][name]:10.5f}"
            f"{found['first_call_seconds'][name]:9.2f}{ratios[0]:>10}{peak / 1e6:9.1f}{ratios[1]:>10}"
            f"{evaluation / 1e6:9.1f}{ratios[2]:>10}{error:9.0e}"
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

"""The atlas, docs/explanation/atlas.md, from the results that the full runs of the demos have left beside this file.

containers/run python demos/atlas/page.py
"""

from comparison import FOLDER, Experiment

PAGE = FOLDER.parents[1] / "docs" / "explanation" / "atlas.md"
NAMES = ["heat_on_a_gear", "darcy_on_a_plate", "waves_on_the_sphere", "outlines_on_the_circle", "few_samples"]

HEAD = """# An atlas of functions

Problems on domains that are no cubes, and what methods come to on them. The network is ours; the others are trained beside
it, on the same samples, on one core. Errors are those of test samples. Numbers are means of five seeds, where something is
drawn, with the deviation of a seed. **The best mean is marked**, whosever it is. Each section is what its demo has found;
`demos/atlas/page.py` makes the page.

FNO: Li et al. 2021, on a grid of the bounding box or of latitude and longitude. DeepONet: Lu et al. 2022, at the nodes. Both
by PyTorch, with at most ten minutes of a core a run.
"""


def section(name: str, experiment: Experiment) -> str:
    """Problem, domain, law and samples, the table, and what else the demo says."""
    more = "\n" + "\n".join(experiment.lines) + "\n" if experiment.lines else ""
    return f"""
## {experiment.problem}

- **Domain.** {experiment.domain}
- **Law.** {experiment.law}
- **Samples.** {experiment.samples}
- **Demo.** [{name}.py](../generated/demos/{name}.rst)

{experiment.table()}
{more}"""


def page() -> str:
    """All sections."""
    return HEAD + "".join(section(name, Experiment.read(name)) for name in NAMES)


def summary() -> str:
    """The README's table: of each problem the best network and the best of the others, with their parameters."""
    rows = [["problem", "test error", "network, %", "best of the others, %"], ["---"] * 4]
    for name in NAMES[:4]:
        experiment = Experiment.read(name)
        both = [[one for one in experiment.results if one.ours == is_ours] for is_ours in (True, False)]
        ours, others = (min(each, key=lambda one: one.mean) for each in both)
        cells = [one.short() for one in (ours, others)]
        cells[ours.mean > others.mean] = f"**{cells[ours.mean > others.mean]}**"
        rows.append([f"[{name}](demos/{name}.py)", experiment.measure, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page())

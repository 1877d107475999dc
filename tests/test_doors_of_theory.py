"""No public method of the classes of control, co-state and theory is left out of the walk over the doors."""

import inspect

import doors_of_theory
import fem_resnet


def test_each_method_with_arguments_has_a_row():
    known = {name.split(".")[0] for name in doors_of_theory.DOORS} | set(doors_of_theory.NO_DOORS)
    classes = [kind for name in sorted(known) if inspect.isclass(kind := getattr(fem_resnet, name))]
    lacking = []
    for kind in classes:
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", member)
            if not inspect.isfunction(function) or name.startswith("_") and name not in ("__call__", "__matmul__"):
                continue
            takes = len(inspect.signature(function).parameters) > 1
            if takes and not getattr(function, "__isabstractmethod__", False) and f"{kind.__name__}.{name}" not in doors_of_theory.DOORS:
                lacking.append(f"{kind.__name__}.{name}")
    assert len(classes) > 40 and not lacking

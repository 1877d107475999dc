"""Counts the Functions and Cofunctions that the package makes."""

import sys

import firedrake as fd


def created_functions(monkeypatch) -> list[str]:
    """A list that grows by the name of the function in fem_resnet that makes a Function or a Cofunction, for each one."""
    created = []

    def counted(kind):
        create = kind.__init__

        def __init__(self, *args, **kwargs):
            frame = sys._getframe(1)
            while frame is not None:
                if frame.f_globals.get("__name__", "").startswith("fem_resnet"):
                    created.append(frame.f_code.co_qualname)
                    break
                frame = frame.f_back
            create(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", __init__)

    counted(fd.Function)
    counted(fd.Cofunction)
    return created

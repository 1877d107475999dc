"""What PyTorch and ONNX make of exported networks, in an environment without Firedrake: read_exports.py FOLDER.

The folder has ``0.npz``, .. and ``0 reference.npz``, .. with inputs and what should come out. It prints the largest errors,
relative to outputs of size one, and writes gradients to ``0 gradients.npz``.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from fem_resnet.export.onnx_graph import onnx_model
from fem_resnet.export.torch_module import ExportedNetwork

assert not any(map(find_spec, ("firedrake", "petsc4py", "mpi4py"))), "expected an environment without Firedrake"


def error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / max(1, np.abs(expected).max()))


def of_torch(path, reference, single=False):
    module = ExportedNetwork(path)
    u = torch.tensor(reference["inputs"])
    if single:
        module, u = module.float(), u.float()
    with torch.no_grad():
        return max(error(module.output(u), reference["output"]), error(module(u), reference["prediction"]))


def of_onnx(path, reference, precision):
    try:
        model = onnx_model(dict(np.load(path)), precision)
    except ValueError as refusal:
        return str(refusal)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = reference["inputs"].astype({"double": np.float64, "single": np.float32}[precision])
    output, prediction = session.run(["output", "prediction"], {"inputs": inputs})
    (first,) = session.run(["output"], {"inputs": inputs[:1]})  # any number of samples
    return max(
        error(output, reference["output"]), error(prediction, reference["prediction"]), error(first, reference["output"][:1])
    )


def gradients(path, reference):
    module = ExportedNetwork(path)
    u = torch.tensor(reference["inputs"], requires_grad=True)
    O, targets = module.output(u), torch.tensor(reference["targets"])
    if str(reference["loss"]) == "cross_entropy":
        J = torch.nn.functional.cross_entropy(O, targets)
    else:
        weights = np.load(path)["output_weights" if "output_weights" in np.load(path) else "weights"]
        J = 0.5 * ((O - targets) ** 2 @ torch.tensor(weights)).mean()
    J.backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"value": J.detach(), "inputs": u.grad} | found


folder, told = Path(sys.argv[1]), {}
for path in sorted(folder.glob("* reference.npz")):
    number = path.stem.split()[0]
    arrays, reference = folder / f"{number}.npz", dict(np.load(path))
    told[number] = {
        "torch": of_torch(arrays, reference), "torch single": of_torch(arrays, reference, True),
        "onnx double": of_onnx(arrays, reference, "double"), "onnx single": of_onnx(arrays, reference, "single"),
    }  # fmt: skip
    if "loss" in reference:
        np.savez(folder / f"{number} gradients.npz", **gradients(arrays, reference))
print(json.dumps(told))

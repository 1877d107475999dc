"""Hessians as TAO's Newton methods ask for them: at a fixed point, preconditioned by Riesz maps, and on some of the rows."""

from __future__ import annotations

from petsc4py import PETSc
from pyadjoint.optimization.tao_solver import ReducedFunctionalHessianMat

__all__ = ["HessianAtItsPoint", "RieszPreconditioner"]


class HessianAtItsPoint(ReducedFunctionalHessianMat):
    """The Hessian at the point where TAO asked for it: the context of a PETSc Mat.

    Trust regions evaluate J elsewhere between two actions, and so does the trust region in which a line search starts.
    pyadjoint's own matrix then acts at the point where the tape happens to be. This one goes back first.
    """

    def __init__(self, rf, **options):
        super().__init__(rf, **options)
        #: How many evaluations the tape had made at the point of the Hessian; None until TAO has asked for one.
        self._evaluation = None

    def update_tape_values(self, *, update_adjoint: bool = True):
        super().update_tape_values(update_adjoint=update_adjoint)
        self._evaluation = self.rf.tape.recompute_count

    def mult_impl(self, A, x):
        if self.rf.tape.recompute_count != self._evaluation:
            self.update_tape_values()
        return super().mult_impl(A, x)

    def createSubMatrix(self, A, rows, columns, reused):
        return _on_subset(A, rows)

    def riesz(self, functional: PETSc.Vec, gradient: PETSc.Vec) -> None:
        """Write the Riesz representative of a functional into `gradient`, Vecs of all coefficients."""
        interface, controls = self.control_interface, self.rf.controls
        functionals = [control._ad_init_zero(dual=True) for control in controls]
        interface.from_petsc(functional, functionals)
        interface.to_petsc(gradient, [control.riesz_map(f) for control, f in zip(controls, functionals)])


class _OnSubset:
    """Some rows and columns of a Hessian and of its Riesz map, as active sets ask for them."""

    def __init__(self, A: PETSc.Mat, rows: PETSc.IS):
        self._A, self._rows, self._shift = A, rows, 0.0
        self._in, self._out = A.createVecRight(), A.createVecLeft()

    def _apply(self, action, x, y):
        self._in.set(0.0)
        self._in.isaxpy(self._rows, 1.0, x)
        action(self._in, self._out)
        part = self._out.getSubVector(self._rows)
        part.copy(y)
        self._out.restoreSubVector(self._rows, part)

    def mult(self, A, x, y):
        self._apply(self._A.mult, x, y)
        y.axpy(self._shift, x)

    def shift(self, A, alpha):
        self._shift += alpha

    def riesz(self, functional, gradient):
        self._apply(self._A.getPythonContext().riesz, functional, gradient)


def _on_subset(A: PETSc.Mat, rows: PETSc.IS) -> PETSc.Mat:
    sizes = rows.getLocalSize(), rows.getSize()
    part = PETSc.Mat().createPython((sizes, sizes), _OnSubset(A, rows), comm=A.comm)
    part.setOption(PETSc.Mat.Option.SYMMETRIC, True)  # type: ignore[arg-type]  # petsc4py declares its options as int
    part.setUp()
    part.assemble()
    return part


class RieszPreconditioner:
    """The Riesz map of a Hessian, or of a part of it, as a PETSc PC. pyadjoint's own does not take parts."""

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write the Riesz representative of x into y.

        Parameters
        ----------
        pc
            The PC, whose matrix has the Riesz map.
        x, y
            Vecs of the coefficients.
        """
        pc.getOperators()[1].getPythonContext().riesz(x, y)

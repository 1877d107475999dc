/* A layer as PETSc TS steps it, compiled: (3.5a) for the coefficients g, its transposed Jacobian, and that in the parameters.

   Behind stage.c. For one explicit layer whose bias, nodal, and kernel do not vary in it: what layer_state, layer_jacobian
   and time_stepping do in Python, to the same numbers. A state vector is samples x (rank of psi + 1), g and q. */

#include <petscts.h>

struct layer {
    const struct label_space *Y;
    const struct basis *phi, *psi;
    const double *a, *beta;     /* beta: rank of phi x rank of psi */
    const double *lambda;       /* NULL in the forward solve */
    double length;
    double *g, *C, *Q;          /* the stage where derivatives are taken, and a rate: rank x samples */
    double *x, *x_q, *D;        /* an adjoint, and what comes of it */
    double *bias, *by_beta;     /* functionals of the parameters */
    double *stages, *lengths;   /* of all steps: C of all stages, one after the other; their lengths */
    long step, steps;
    long reductions;            /* how many sums over the ranks there were */
    MPI_Fint comm;
};

static PetscErrorCode read_state(const struct layer *layer, Vec y, double *g, double *q) {
    const long rank = layer->psi->rank, samples = layer->Y->samples;
    const double *values;
    PetscFunctionBeginUser;
    PetscCall(VecGetArrayRead(y, &values));
    for (long s = 0; s < samples; s++) {
        for (long k = 0; k < rank; k++) g[k * samples + s] = values[s * (rank + 1) + k];
        if (q) q[s] = values[s * (rank + 1) + rank];
    }
    PetscCall(VecRestoreArrayRead(y, &values));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode write_state(const struct layer *layer, Vec y, const double *g) {
    const long rank = layer->psi->rank, samples = layer->Y->samples;
    double *values;
    PetscFunctionBeginUser;
    PetscCall(VecGetArrayWrite(y, &values));
    for (long s = 0; s < samples; s++) {
        for (long k = 0; k < rank; k++) values[s * (rank + 1) + k] = g[k * samples + s];
        values[s * (rank + 1) + rank] = 0.0;
    }
    PetscCall(VecRestoreArrayWrite(y, &values));
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* C = beta g */
static void act(const struct layer *layer, const double *g, double *C) {
    const long phi = layer->phi->rank, psi = layer->psi->rank, samples = layer->Y->samples;
    memset(C, 0, phi * samples * sizeof(double));
    for (long i = 0; i < phi; i++)
        for (long j = 0; j < psi; j++)
            for (long s = 0; s < samples; s++) C[i * samples + s] += layer->beta[i * psi + j] * g[j * samples + s];
}

static PetscErrorCode sum_over_ranks(struct layer *layer, double *values, long count) {
    MPI_Comm comm = MPI_Comm_f2c(layer->comm);
    int size;
    PetscFunctionBeginUser;
    PetscCallMPI(MPI_Comm_size(comm, &size));
    if (size > 1) {
        PetscCallMPI(MPI_Allreduce(MPI_IN_PLACE, values, (int)count, MPI_DOUBLE, MPI_SUM, comm));
        layer->reductions++;
    }
    PetscFunctionReturn(PETSC_SUCCESS);
}

PetscErrorCode layer_rate(TS ts, PetscReal t, Vec y, Vec F, void *context) {
    struct layer *layer = context;
    PetscFunctionBeginUser;
    PetscCall(read_state(layer, y, layer->g, NULL));
    act(layer, layer->g, layer->C);
    PetscCheck(!rate(layer->Y, layer->phi, layer->psi, layer->a, layer->C, layer->length, layer->Q, NULL), PETSC_COMM_SELF,
               PETSC_ERR_MEM, "no memory for the sums of a stage");
    PetscCall(sum_over_ranks(layer, layer->Q, layer->psi->rank * layer->Y->samples));
    PetscCall(write_state(layer, F, layer->Q));
    PetscFunctionReturn(PETSC_SUCCESS);
}

PetscErrorCode layer_point(TS ts, PetscReal t, Vec y, Mat J, Mat P, void *context) {
    struct layer *layer = context;
    PetscFunctionBeginUser;
    PetscCall(read_state(layer, y, layer->g, NULL));
    act(layer, layer->g, layer->C);
    PetscFunctionReturn(PETSC_SUCCESS);
}

PetscErrorCode layer_nothing(TS ts, PetscReal t, Vec y, Mat J, void *context) { return PETSC_SUCCESS; }

/* The transposed Jacobian; PETSc asks for the parameters' at the same stage next, and what that needs is kept. */
PetscErrorCode layer_transpose(Mat J, Vec x, Vec y) {
    struct layer *layer;
    PetscFunctionBeginUser;
    PetscCall(MatShellGetContext(J, &layer));
    const long phi = layer->phi->rank, psi = layer->psi->rank, samples = layer->Y->samples;
    PetscCall(read_state(layer, x, layer->x, layer->x_q));
    PetscCheck(!transpose(layer->Y, layer->phi, layer->psi, layer->a, layer->C, layer->length, layer->x,
                          layer->lambda ? layer->x_q : NULL, layer->lambda, layer->D, layer->bias, NULL),
               PETSC_COMM_SELF, PETSC_ERR_MEM, "no memory for the sums of a stage");
    PetscCall(sum_over_ranks(layer, layer->D, phi * samples));
    memset(layer->Q, 0, psi * samples * sizeof(double));
    for (long i = 0; i < phi; i++)
        for (long j = 0; j < psi; j++) {
            double paired = 0.0;
            for (long s = 0; s < samples; s++) {
                layer->Q[j * samples + s] -= layer->beta[i * psi + j] * layer->D[i * samples + s];
                paired -= layer->D[i * samples + s] * layer->g[j * samples + s];
            }
            layer->by_beta[i * psi + j] = paired;
        }
    PetscCall(write_state(layer, y, layer->Q));
    PetscFunctionReturn(PETSC_SUCCESS);
}

PetscErrorCode layer_parameters(Mat J, Vec x, Vec y) {
    struct layer *layer;
    double *values;
    PetscFunctionBeginUser;
    PetscCall(MatShellGetContext(J, &layer));
    PetscCall(VecGetArrayWrite(y, &values));
    memcpy(values, layer->bias, layer->Y->nodes * sizeof(double));
    memcpy(values + layer->Y->nodes, layer->by_beta, layer->phi->rank * layer->psi->rank * sizeof(double));
    PetscCall(VecRestoreArrayWrite(y, &values));
    PetscFunctionReturn(PETSC_SUCCESS);
}

PetscErrorCode layer_keep_step(TS ts) {
    struct layer *layer;
    PetscInt count;
    Vec *stages;
    PetscFunctionBeginUser;
    PetscCall(TSGetApplicationContext(ts, &layer));
    const long size = layer->phi->rank * layer->Y->samples;
    PetscReal now, before;
    PetscCheck(layer->step < layer->steps, PETSC_COMM_SELF, PETSC_ERR_PLIB, "more steps than were asked for");
    PetscCall(TSGetTime(ts, &now));
    PetscCall(TSGetPrevTime(ts, &before));
    layer->lengths[layer->step] = now - before;
    PetscCall(TSGetStages(ts, &count, &stages));
    for (PetscInt i = 0; i < count; i++) {
        PetscCall(read_state(layer, stages[i], layer->g, NULL));
        act(layer, layer->g, layer->stages + (layer->step * count + i) * size);
    }
    layer->step++;
    PetscFunctionReturn(PETSC_SUCCESS);
}

PetscErrorCode layer_attach(TS ts, Mat J, struct layer *layer) {
    PetscFunctionBeginUser;
    PetscCall(MatShellSetContext(J, layer));
    PetscCall(MatShellSetOperation(J, MATOP_MULT_TRANSPOSE, (void (*)(void))layer_transpose));
    PetscCall(TSSetRHSFunction(ts, NULL, layer_rate, layer));
    PetscCall(TSSetRHSJacobian(ts, J, J, layer_point, layer));
    PetscCall(TSSetApplicationContext(ts, layer));
    PetscCall(TSSetPostStep(ts, layer_keep_step));
    PetscFunctionReturn(PETSC_SUCCESS);
}

PetscErrorCode layer_attach_parameters(TS ts, Mat J, struct layer *layer) {
    PetscFunctionBeginUser;
    PetscCall(MatShellSetContext(J, layer));
    PetscCall(MatShellSetOperation(J, MATOP_MULT_TRANSPOSE, (void (*)(void))layer_parameters));
    PetscCall(TSSetRHSJacobianP(ts, J, layer_nothing, layer));
    PetscFunctionReturn(PETSC_SUCCESS);
}

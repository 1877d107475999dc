/* A layer as PETSc TS steps it, compiled: (3.5a) for g, its transposed Jacobian, and the transposed Jacobian in the
   parameters.

   This file stands behind stage.c. It is for one explicit layer whose bias and kernel do not vary in time, and does there
   what state.py, jacobian.py and ts_layer.py do in Python, to the same numbers. A state vector is samples x (rank of psi +
   1) numbers, g and q.

   TS asks for the stages in the order of the tableau: forward from the first stage on, backwards from the last one. So f is
   added up on the way, with the weights of the method, and in the adjoint the functional in the bias is added up on the way
   too. These two have the size of the mesh, and TS would go over them five times a stage. A parameter of derivative one, whose
   functional TS adds up itself, shows whether TS has weighted the stages as this file assumes. */

#include <petscblaslapack.h>
#include <petscts.h>

#if defined PETSC_USE_COMPLEX || !defined PETSC_USE_REAL_DOUBLE
#error "PETSc: expected a build with real numbers of double precision, got another; set PETSC_DIR and PETSC_ARCH"
#endif

struct layer {
    const struct label_space *Y;
    const struct basis *phi, *psi;
    const REAL *a;
    const double *beta;         /* rank of phi x rank of psi */
    const REAL *lambda_;        /* the functional in f at the end of the segment; NULL for 0 */
    double *f;                  /* the integral of f_t is added to it in the forward solve; may be NULL */
    const double *weights;      /* b_i of the method */
    double *C, *D;              /* beta g, and minus the functional in it, at the present stage: samples x rank of phi */
    double *bias, *by_beta;     /* functionals in a, of all stages together, and in beta, of the present stage */
    double *stages, *lengths;   /* C of all stages of all steps; the steps' lengths, first as planned and then as made */
    double length;
    TS ts;
    Vec y, adjoint, parameters; /* the state; functionals in the state, in beta and in the parameter of derivative one */
    Vec point;                  /* the state at which derivatives are taken */
    long method_stages;
    long reuses;                /* 1 if the last slope of a step is the first of the next step, else 0 */
    long step, steps;
    long replays;               /* 1 if the steps are given one by one, 0 if they are equal */
    long max_steps;
    long asked;                 /* number of stages that TS has asked for in this solve, or in its adjoint */
    long reductions;            /* number of sums over the ranks */
    MPI_Fint comm;
};

#define KEPT_STATE 4096 /* size of a state up to which TS keeps the vectors with which it works in the adjoint */
#define RANK(layer) ((layer)->psi->rank)
#define LD(layer) ((layer)->psi->rank + 1)

/* C := alpha op(A) op(B), columns one after the other. */
static PetscErrorCode multiply(const char *op_A, const char *op_B, long m, long n, long k, double alpha, const double *A,
                               long lda, const double *B, long ldb, double *C, long ldc) {
    const double zero = 0.0;
    PetscBLASInt size[6];
    PetscFunctionBeginUser;
    PetscCall(PetscBLASIntCast(m, size));
    PetscCall(PetscBLASIntCast(n, size + 1));
    PetscCall(PetscBLASIntCast(k, size + 2));
    PetscCall(PetscBLASIntCast(lda, size + 3));
    PetscCall(PetscBLASIntCast(ldb, size + 4));
    PetscCall(PetscBLASIntCast(ldc, size + 5));
    PetscCallBLAS("BLASgemm", BLASgemm_(op_A, op_B, size, size + 1, size + 2, &alpha, A, size + 3, B, size + 4, &zero, C,
                                        size + 5));
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* C = beta g */
static PetscErrorCode act(const struct layer *layer, Vec y, double *C) {
    const long phi = layer->phi->rank;
    const double *g;
    PetscFunctionBeginUser;
    PetscCall(VecGetArrayRead(y, &g));
    PetscCall(multiply("T", "N", phi, layer->Y->samples, RANK(layer), 1.0, layer->beta, RANK(layer), g, LD(layer), C, phi));
    PetscCall(VecRestoreArrayRead(y, &g));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode sum_over_ranks(struct layer *layer, double *values, long count) {
    MPI_Comm comm = MPI_Comm_f2c(layer->comm);
    PetscMPIInt size, numbers;
    PetscFunctionBeginUser;
    PetscCallMPI(MPI_Comm_size(comm, &size));
    if (size > 1) {
        PetscCall(PetscMPIIntCast(count, &numbers));
        PetscCallMPI(MPI_Allreduce(MPI_IN_PLACE, values, numbers, MPI_DOUBLE, MPI_SUM, comm));
        layer->reductions++;
    }
    PetscFunctionReturn(PETSC_SUCCESS);
}

static void clear_q(const struct layer *layer, double *state) {
    for (long s = 0; s < layer->Y->samples; s++) state[s * LD(layer) + RANK(layer)] = 0.0;
}

/* The weight h b_i with which f takes the slope that TS asks for next. A slope that is the first one of the next step too
   has its weight there. */
static double forward_weight(struct layer *layer, double h) {
    const long later = layer->method_stages - layer->reuses, last = layer->method_stages - 1;
    long step = 0, stage = layer->asked++;
    if (stage > last) {
        step = 1 + (stage - layer->method_stages) / later;
        stage = layer->reuses + (stage - layer->method_stages) % later;
    }
    if (layer->reuses && stage == last) return step + 1 < layer->steps ? layer->lengths[step + 1] * layer->weights[0] : 0.0;
    return h * layer->weights[stage];
}

static PetscErrorCode layer_rate(TS ts, PetscReal t, Vec y, Vec F, void *context) {
    struct layer *layer = context;
    PetscReal h;
    double *rates;
    PetscFunctionBeginUser;
    PetscCall(TSGetTimeStep(ts, &h));
    PetscCall(act(layer, y, layer->C));
    PetscCall(VecGetArrayWrite(F, &rates));
    clear_q(layer, rates);
    const double weight = forward_weight(layer, h);
    PetscCheck(!rate(layer->Y, layer->phi, layer->psi, layer->a, layer->C, layer->phi->rank, layer->length, rates, LD(layer),
                     NULL, weight != 0.0 ? layer->f : NULL, weight),
               PETSC_COMM_SELF, PETSC_ERR_MEM, "no memory for the sums of a stage");
    PetscCall(sum_over_ranks(layer, rates, layer->Y->samples * LD(layer)));
    PetscCall(VecRestoreArrayWrite(F, &rates));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode layer_point(TS ts, PetscReal t, Vec y, Mat J, Mat P, void *context) {
    struct layer *layer = context;
    PetscFunctionBeginUser;
    layer->point = y;
    PetscCall(act(layer, y, layer->C));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode layer_nothing(TS ts, PetscReal t, Vec y, Mat J, void *context) { return PETSC_SUCCESS; }

/* The weight that TS gives to the stage that it asks for next in the adjoint: h b_i, or h where b_i = 0. */
static double adjoint_weight(struct layer *layer) {
    const long stages = layer->method_stages - layer->reuses;
    const double h = layer->lengths[layer->steps - 1 - layer->asked / stages];
    const double b = layer->weights[stages - 1 - layer->asked % stages];
    layer->asked++;
    return b != 0.0 ? h * b : h;
}

/* The product with the transposed Jacobian. PETSc asks for the product in the parameters at the same stage next, which needs
   by_beta. */
static PetscErrorCode layer_transpose(Mat J, Vec x, Vec y) {
    struct layer *layer;
    const double *adjoint, *g;
    double *by_g;
    PetscFunctionBeginUser;
    PetscCall(MatShellGetContext(J, &layer));
    const long phi = layer->phi->rank, psi = RANK(layer), samples = layer->Y->samples;
    PetscCheck(layer->asked < layer->steps * (layer->method_stages - layer->reuses), PETSC_COMM_SELF, PETSC_ERR_PLIB,
               "more stages than the method has");
    PetscCall(VecGetArrayRead(x, &adjoint));
    PetscCheck(!transpose(layer->Y, layer->phi, layer->psi, layer->a, layer->C, phi, layer->length, adjoint, LD(layer),
                          layer->lambda_, layer->D, layer->bias, adjoint_weight(layer), NULL),
               PETSC_COMM_SELF, PETSC_ERR_MEM, "no memory for the sums of a stage");
    PetscCall(VecRestoreArrayRead(x, &adjoint));
    PetscCall(sum_over_ranks(layer, layer->D, phi * samples));
    PetscCall(VecGetArrayWrite(y, &by_g));
    clear_q(layer, by_g);
    PetscCall(multiply("N", "N", psi, samples, phi, -1.0, layer->beta, psi, layer->D, phi, by_g, LD(layer)));
    PetscCall(VecRestoreArrayWrite(y, &by_g));
    PetscCall(VecGetArrayRead(layer->point, &g));
    PetscCall(multiply("N", "T", psi, phi, samples, -1.0, g, LD(layer), layer->D, phi, layer->by_beta, psi));
    PetscCall(VecRestoreArrayRead(layer->point, &g));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode layer_parameters(Mat J, Vec x, Vec y) {
    struct layer *layer;
    double *values;
    PetscFunctionBeginUser;
    PetscCall(MatShellGetContext(J, &layer));
    const long size = layer->phi->rank * RANK(layer);
    PetscCall(VecGetArrayWrite(y, &values));
    memcpy(values, layer->by_beta, size * sizeof(double));
    values[size] = 1.0;
    PetscCall(VecRestoreArrayWrite(y, &values));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode layer_set_step(TS ts) {
    struct layer *layer;
    PetscFunctionBeginUser;
    PetscCall(TSGetApplicationContext(ts, &layer));
    if (layer->replays && layer->step < layer->steps) PetscCall(TSSetTimeStep(ts, layer->lengths[layer->step]));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode layer_keep_step(TS ts) {
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
    for (PetscInt i = 0; i < count; i++) PetscCall(act(layer, stages[i], layer->stages + (layer->step * count + i) * size));
    layer->step++;
    PetscCheck(layer->asked == layer->step * (layer->method_stages - layer->reuses) + layer->reuses, PETSC_COMM_SELF,
               PETSC_ERR_PLIB, "another number of stages than the method has");
    PetscFunctionReturn(PETSC_SUCCESS);
}

PetscErrorCode layer_attach(struct layer *layer, Mat J, Mat by_parameters) {
    TS ts = layer->ts;
    PetscFunctionBeginUser;
    PetscCall(MatShellSetContext(J, layer));
    PetscCall(MatShellSetOperation(J, MATOP_MULT_TRANSPOSE, (void (*)(void))layer_transpose));
    PetscCall(MatShellSetContext(by_parameters, layer));
    PetscCall(MatShellSetOperation(by_parameters, MATOP_MULT_TRANSPOSE, (void (*)(void))layer_parameters));
    PetscCall(TSSetRHSFunction(ts, NULL, layer_rate, layer));
    PetscCall(TSSetRHSJacobian(ts, J, J, layer_point, layer));
    PetscCall(TSSetRHSJacobianP(ts, by_parameters, layer_nothing, layer));
    PetscCall(TSSetApplicationContext(ts, layer));
    PetscCall(TSSetPreStep(ts, layer_set_step));
    PetscCall(TSSetPostStep(ts, layer_keep_step));
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* A state holds g, rank of psi numbers for each sample, and one number q behind them. */
static PetscErrorCode write_state(const struct layer *layer, Vec state, const double *g, double q) {
    double *values;
    PetscFunctionBeginUser;
    PetscCall(VecGetArrayWrite(state, &values));
    for (long s = 0; s < layer->Y->samples; s++) {
        memcpy(values + s * LD(layer), g + s * RANK(layer), RANK(layer) * sizeof(double));
        values[s * LD(layer) + RANK(layer)] = q;
    }
    PetscCall(VecRestoreArrayWrite(state, &values));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode read_state(const struct layer *layer, Vec state, double *g) {
    const double *values;
    PetscFunctionBeginUser;
    PetscCall(VecGetArrayRead(state, &values));
    for (long s = 0; s < layer->Y->samples; s++)
        memcpy(g + s * RANK(layer), values + s * LD(layer), RANK(layer) * sizeof(double));
    PetscCall(VecRestoreArrayRead(state, &values));
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* Solve. The trajectory, if it is saved, stays in memory; the default is one file a step. */
static PetscErrorCode solve(struct layer *layer, int save) {
    TS ts = layer->ts;
    PetscFunctionBeginUser;
    PetscCall(TSRemoveTrajectory(ts));
    if (save) {
        TSTrajectory trajectory;
        PetscCall(TSSetSaveTrajectory(ts));
        PetscCall(TSGetTrajectory(ts, &trajectory));
        PetscCall(TSTrajectorySetType(trajectory, ts, TSTRAJECTORYMEMORY));
    }
    PetscCall(TSSetTime(ts, 0.0));
    PetscCall(TSSetMaxTime(ts, 1.0));
    PetscCall(TSSetMaxSteps(ts, (PetscInt)layer->max_steps));
    PetscCall(TSSetStepNumber(ts, 0));
    PetscCall(TSSetTimeStep(ts, layer->lengths[0]));
    PetscCall(TSRestartStep(ts)); /* the last slope of an earlier solve is not the first one of this solve */
    PetscCall(TSSolve(ts, layer->y));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode solve_back(struct layer *layer) {
    PetscFunctionBeginUser;
    PetscCall(VecSet(layer->parameters, 0.0));
    PetscCall(TSSetCostGradients(layer->ts, 1, &layer->adjoint, &layer->parameters));
    PetscCall(TSAdjointSolve(layer->ts));
    /* These are five states a layer, which no other layer could use. Small ones are kept, as making them takes long. */
    if (LD(layer) * layer->Y->samples > KEPT_STATE) PetscCall(TSAdjointReset(layer->ts));
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* How a solve of several layers ended: the last layer, the reason of TS there, and whether its state is finite. */
struct outcome {
    long layer, reason, finite;
};

static PetscErrorCode note(const struct layer *layer, const double *g, struct outcome *outcome) {
    TSConvergedReason reason;
    PetscFunctionBeginUser;
    PetscCall(TSGetConvergedReason(layer->ts, &reason));
    outcome->reason = reason;
    outcome->finite = 1;
    for (long i = 0; i < RANK(layer) * layer->Y->samples; i++) outcome->finite &= !PetscIsInfOrNanReal(g[i]);
    PetscFunctionReturn(PETSC_SUCCESS);
}

#define WENT_WELL(outcome) ((outcome)->reason >= 0 && (outcome)->finite)

/* From g at the start of layers with one psi to g at their end. */
PetscErrorCode layers_forward(struct layer **layers, long count, double *g, long save, struct outcome *outcome) {
    PetscFunctionBeginUser;
    for (long l = 0; l < count; l++) {
        struct layer *layer = layers[l];
        outcome->layer = l;
        PetscCall(write_state(layer, layer->y, g, 0.0));
        PetscCall(solve(layer, (int)save));
        PetscCall(read_state(layer, layer->y, g));
        PetscCall(note(layer, g, outcome));
        if (!WENT_WELL(outcome)) break;
    }
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* From gamma at the end of the layers to gamma at the start of each; the array has count + 1 of them, the end last. The
   number behind the coefficients, 1, brings lambda to every stage. */
PetscErrorCode layers_adjoint(struct layer **layers, long count, double *gamma, struct outcome *outcome) {
    PetscFunctionBeginUser;
    for (long l = count - 1; l >= 0; l--) {
        struct layer *layer = layers[l];
        double *start = gamma + l * RANK(layer) * layer->Y->samples;
        outcome->layer = l;
        PetscCall(write_state(layer, layer->adjoint, start + RANK(layer) * layer->Y->samples, layer->lambda_ ? 1.0 : 0.0));
        PetscCall(solve_back(layer));
        PetscCall(read_state(layer, layer->adjoint, start));
        PetscCall(note(layer, start, outcome));
        if (!WENT_WELL(outcome)) break;
    }
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* A layer as PETSc TS steps it, compiled: (3.5a) for the coefficients g, its transposed Jacobian, and that in the parameters.

   Behind stage.c. For one explicit layer whose bias and kernel do not vary in it: what layer_state, layer_jacobian and
   time_stepping do in Python, to the same numbers. A state vector is samples x (rank of psi + 1), g and q.

   TS knows each stage by what it asks for, in the tableau's order: forward from the first stage on, backwards from the last.
   So f is added up with the method's weights on the way, and in the adjoint so is the functional of the bias, which has the
   size of the mesh: TS would go over it five times a stage. That TS has weighted the stages as is taken for granted here is
   seen from a parameter of derivative one, which it adds up itself. */

#include <petscblaslapack.h>
#include <petscts.h>

#if defined PETSC_USE_COMPLEX || !defined PETSC_USE_REAL_DOUBLE
#error "PETSc: expected real numbers of double precision, this one has others"
#endif

struct layer {
    const struct label_space *Y;
    const struct basis *phi, *psi;
    const REAL *a;
    const double *beta;         /* rank of phi x rank of psi */
    const REAL *lambda_;        /* of the adjoint; NULL for 0 */
    double *f;                  /* takes the integral of f_t in the forward solve; may be NULL */
    const double *weights;      /* b_i of the method */
    double *C, *D;              /* at the stage where derivatives are taken: samples x rank of phi */
    double *bias, *by_beta;     /* functionals of the parameters: at a, of all stages; at beta, of one */
    double *stages, *lengths;   /* of all steps: C of all stages, one after the other; their lengths, to be and as they were */
    double length;
    TS ts;
    Vec y, adjoint, parameters; /* the state, its adjoint, functionals of beta and of the parameter of derivative one */
    Vec point;                  /* where derivatives are taken */
    long method_stages;
    long reuses;                /* whether the last slope of a step is the next one's first: 1 or 0 */
    long step, steps;
    long replays;               /* whether the steps are given one by one, and not equal */
    long max_steps;
    long asked;                 /* stages evaluated in this solve, or adjoined */
    long reductions;            /* how many sums over the ranks there were */
    MPI_Fint comm;
};

#define KEPT_STATE 4096 /* numbers of a state up to which TS keeps what it works with in the adjoint */
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

/* What f takes of the slope that TS asks for next: h b_i; a slope that is the next step's first too has that one's weight. */
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

/* What TS weighs the stage by that it asks for next in the adjoint, or 1 where b_i = 0. */
static double adjoint_weight(struct layer *layer) {
    const long stages = layer->method_stages - layer->reuses;
    const double h = layer->lengths[layer->steps - 1 - layer->asked / stages];
    const double b = layer->weights[stages - 1 - layer->asked % stages];
    layer->asked++;
    return b != 0.0 ? h * b : h;
}

/* The transposed Jacobian; PETSc asks for the parameters' at the same stage next, and what that needs is kept. */
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

/* A state holds g, samples x rank of psi, and a number behind that of each sample. */
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

/* The trajectory, if it is saved, stays in memory: by its own options it goes to files, one a step. */
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
    PetscCall(TSRestartStep(ts)); /* the last slope of an earlier solve is no first one of this */
    PetscCall(TSSolve(ts, layer->y));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode solve_back(struct layer *layer) {
    PetscFunctionBeginUser;
    PetscCall(VecSet(layer->parameters, 0.0));
    PetscCall(TSSetCostGradients(layer->ts, 1, &layer->adjoint, &layer->parameters));
    PetscCall(TSAdjointSolve(layer->ts));
    /* Five states a layer, which no other layer could use; to make small ones again would take longer than they are worth. */
    if (LD(layer) * layer->Y->samples > KEPT_STATE) PetscCall(TSAdjointReset(layer->ts));
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* How a solve of several layers ended: at which, with which reason of TS, and whether its state is finite. */
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

/* From gamma at the end of the layers, the last of count + 1, to gamma at the start of each. lambda comes with the number
   behind the coefficients. */
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

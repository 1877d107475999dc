/* Stage of a layer, compiled: what layer.Stage does for values, in the same notation, and to the same numbers.

   Put in front: the vectorised functions of the C library, VALUE(s) and SLOPE(s), which are sigma and sigma'.

   Nodes are innermost. A block of nodes goes through all of a stage while u, sigma and the block's rows of Phi and Psi are
   in the first-level cache: Phi and Psi are read from memory once a stage, and nothing of size nodes x samples is but f and
   lambda, where they are wanted. Products are tiles of 4 x 4 vectors in registers; sums over nodes are kept one a lane,
   and added up at the end. */

#include <stdlib.h>
#include <string.h>

#if defined __AVX512F__
#define LANES 8
#elif defined __AVX__
#define LANES 4
#else
#define LANES 2
#endif

#define BLOCK 64  /* nodes */
#define CHUNK 16  /* samples */
#define TILE (4 * LANES)
#define UNROLL _Pragma("GCC unroll 4")
#define ALWAYS static inline __attribute__((always_inline))

typedef double vec __attribute__((vector_size(8 * LANES)));
typedef double loose __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

ALWAYS vec get(const double *x) { return *(const loose *)x; }
ALWAYS void put(double *x, vec v) { *(loose *)x = v; }

/* A basis at the nodes: column k begins at values + k * nodes. */
struct basis {
    const double *values;
    long rank;
};

struct label_space {
    long nodes;
    long samples;
    const double *weights;
};

/* What a block of nodes reads; the last block, if it is not full, from copies that zeros fill up. */
struct block {
    long start, nodes;
    const double *phi, *psi, *a, *weights;
    long phi_stride, psi_stride;
};

struct scratch {
    vec *sums; /* rank x CHUNK */
    double *phi, *psi;
    double a[BLOCK], weights[BLOCK];
};

static void fill_up(double *copy, const double *values, long columns, long stride, long nodes) {
    for (long k = 0; k < columns; k++) {
        memset(copy + k * BLOCK, 0, BLOCK * sizeof(double));
        memcpy(copy + k * BLOCK, values + k * stride, nodes * sizeof(double));
    }
}

static int new_scratch(struct scratch *scratch, long phi, long psi) {
    long rank = phi > psi ? phi : psi;
    scratch->sums = aligned_alloc(sizeof(vec), rank * CHUNK * sizeof(vec));
    scratch->phi = malloc((phi + psi) * BLOCK * sizeof(double));
    scratch->psi = scratch->phi + phi * BLOCK;
    return scratch->sums && scratch->phi;
}

static void free_scratch(struct scratch *scratch) {
    free(scratch->sums);
    free(scratch->phi);
}

static struct block block_at(long start, const struct label_space *Y, const struct basis *phi, const struct basis *psi,
                             const double *a, struct scratch *scratch) {
    long nodes = Y->nodes - start;
    if (nodes >= BLOCK)
        return (struct block){start, BLOCK, phi->values + start, psi->values + start, a + start, Y->weights + start,
                              Y->nodes, Y->nodes};
    fill_up(scratch->phi, phi->values + start, phi->rank, Y->nodes, nodes);
    fill_up(scratch->psi, psi->values + start, psi->rank, Y->nodes, nodes);
    fill_up(scratch->a, a + start, 1, 0, nodes);
    fill_up(scratch->weights, Y->weights + start, 1, 0, nodes);
    return (struct block){start, nodes, scratch->phi, scratch->psi, scratch->a, scratch->weights, BLOCK, BLOCK};
}

/* u = a - Phi C on a tile of nodes and of `samples` <= 4 samples; u, here and below, is samples x BLOCK. */
ALWAYS void affine_tile(int samples, const double *restrict phi, long stride, long rank, const double *restrict a,
                        const double *restrict C, long ldc, double *restrict u) {
    vec sum[4][4];
    UNROLL
    for (int s = 0; s < samples; s++)
        UNROLL
        for (int v = 0; v < 4; v++) sum[s][v] = get(a + v * LANES);
    for (long k = 0; k < rank; k++) {
        vec p[4];
        UNROLL
        for (int v = 0; v < 4; v++) p[v] = get(phi + k * stride + v * LANES);
        UNROLL
        for (int s = 0; s < samples; s++) {
            double c = C[k * ldc + s];
            UNROLL
            for (int v = 0; v < 4; v++) sum[s][v] -= c * p[v];
        }
    }
    UNROLL
    for (int s = 0; s < samples; s++)
        UNROLL
        for (int v = 0; v < 4; v++) put(u + s * BLOCK + v * LANES, sum[s][v]);
}

static void affine(long samples, const double *phi, long stride, long rank, const double *a, const double *C, long ldc,
                   double *u) {
#define AFFINE(count) affine_tile(count, phi + n, stride, rank, a + n, C + s, ldc, u + s * BLOCK + n)
    for (long n = 0; n < BLOCK; n += TILE) {
        long s = 0;
        for (; s + 4 <= samples; s += 4) AFFINE(4);
        switch (samples - s) {
        case 3: AFFINE(3); break;
        case 2: AFFINE(2); break;
        case 1: AFFINE(1); break;
        }
    }
}

/* sums += Psi^T v for `ranks` <= 4 functions and `samples` <= 4 samples, over a block of nodes. */
ALWAYS void project_tile(int ranks, int samples, const double *restrict psi, long stride, const double *restrict v,
                         vec *restrict sums) {
    vec sum[4][4];
    UNROLL
    for (int k = 0; k < ranks; k++)
        UNROLL
        for (int s = 0; s < samples; s++) sum[k][s] = sums[k * CHUNK + s];
    for (int n = 0; n < BLOCK; n += LANES) {
        vec q[4];
        UNROLL
        for (int s = 0; s < samples; s++) q[s] = get(v + s * BLOCK + n);
        UNROLL
        for (int k = 0; k < ranks; k++) {
            vec p = get(psi + k * stride + n);
            UNROLL
            for (int s = 0; s < samples; s++) sum[k][s] += p * q[s];
        }
    }
    UNROLL
    for (int k = 0; k < ranks; k++)
        UNROLL
        for (int s = 0; s < samples; s++) sums[k * CHUNK + s] = sum[k][s];
}

ALWAYS void project_rows(int ranks, long samples, const double *psi, long stride, const double *v, vec *sums) {
    long s = 0;
    for (; s + 4 <= samples; s += 4) project_tile(ranks, 4, psi, stride, v + s * BLOCK, sums + s);
    switch (samples - s) {
    case 3: project_tile(ranks, 3, psi, stride, v + s * BLOCK, sums + s); break;
    case 2: project_tile(ranks, 2, psi, stride, v + s * BLOCK, sums + s); break;
    case 1: project_tile(ranks, 1, psi, stride, v + s * BLOCK, sums + s); break;
    }
}

static void project(long samples, const double *psi, long stride, long rank, const double *v, vec *sums) {
    long k = 0;
    for (; k + 4 <= rank; k += 4) project_rows(4, samples, psi + k * stride, stride, v, sums + k * CHUNK);
    switch (rank - k) {
    case 3: project_rows(3, samples, psi + k * stride, stride, v, sums + k * CHUNK); break;
    case 2: project_rows(2, samples, psi + k * stride, stride, v, sums + k * CHUNK); break;
    case 1: project_rows(1, samples, psi + k * stride, stride, v, sums + k * CHUNK); break;
    }
}

static void add_up(long samples, long rank, const vec *sums, double *Q, long ldq) {
    for (long k = 0; k < rank; k++)
        for (long s = 0; s < samples; s++) {
            double total = 0.0;
            for (int lane = 0; lane < LANES; lane++) total += sums[k * CHUNK + s][lane];
            Q[k * ldq + s] = total;
        }
}

#define CHUNKS(Y) for (long first = 0, samples; samples = Y->samples - first < CHUNK ? Y->samples - first : CHUNK, \
                       first < Y->samples; first += CHUNK)

/* Q = Psi^T M tau sigma(u), this rank's part, rank of psi x samples. `s`, or NULL, takes tau sigma(u), nodes x samples. */
int rate(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const double *a, const double *C,
         double tau, double *Q, double *s_out) {
    struct scratch scratch;
    double u[CHUNK * BLOCK];
    if (!new_scratch(&scratch, phi->rank, psi->rank)) return 1;
    CHUNKS(Y) {
        memset(scratch.sums, 0, psi->rank * CHUNK * sizeof(vec));
        for (long start = 0; start < Y->nodes; start += BLOCK) {
            struct block b = block_at(start, Y, phi, psi, a, &scratch);
            affine(samples, b.phi, b.phi_stride, phi->rank, b.a, C + first, Y->samples, u);
            for (long s = 0; s < samples; s++) {
                double *row = u + s * BLOCK;
#pragma omp simd
                for (int n = 0; n < BLOCK; n++) row[n] = tau * VALUE(row[n]);
                if (s_out)
                    for (long n = 0; n < b.nodes; n++) s_out[(start + n) * Y->samples + first + s] = row[n];
#pragma omp simd
                for (int n = 0; n < BLOCK; n++) row[n] *= b.weights[n];
            }
            project(samples, b.psi, b.psi_stride, psi->rank, u, scratch.sums);
        }
        add_up(samples, psi->rank, scratch.sums, Q + first, Y->samples);
    }
    free_scratch(&scratch);
    return 0;
}

/* For w = M Psi x + x_q lambda and v = tau sigma'(u) w: D = Phi^T v, this rank's part, and bias = sum over samples of v;
   `length`, or NULL, takes <w, sigma(u)>, this rank's part. x_q may be NULL for 0; lambda has its nodes innermost. */
int transpose(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const double *a,
              const double *C, double tau, const double *x, const double *x_q, const double *lambda, double *D,
              double *bias, double *length) {
    static const double zero[BLOCK];
    struct scratch scratch;
    double u[CHUNK * BLOCK], w[CHUNK * BLOCK];
    double paired = 0.0;
    if (!new_scratch(&scratch, phi->rank, psi->rank)) return 1;
    memset(bias, 0, Y->nodes * sizeof(double));
    CHUNKS(Y) {
        memset(scratch.sums, 0, phi->rank * CHUNK * sizeof(vec));
        for (long start = 0; start < Y->nodes; start += BLOCK) {
            struct block b = block_at(start, Y, phi, psi, a, &scratch);
            double sum[BLOCK] = {0.0};
            affine(samples, b.phi, b.phi_stride, phi->rank, b.a, C + first, Y->samples, u);
            affine(samples, b.psi, b.psi_stride, psi->rank, zero, x + first, Y->samples, w); /* -Psi x */
            for (long s = 0; s < samples; s++) {
                double *row = u + s * BLOCK, *dual = w + s * BLOCK;
#pragma omp simd
                for (int n = 0; n < BLOCK; n++) dual[n] *= -b.weights[n];
                if (x_q) {
                    const double *column = lambda + (first + s) * Y->nodes + start;
                    double factor = x_q[first + s];
#pragma omp simd
                    for (int n = 0; n < b.nodes; n++) dual[n] += factor * column[n];
                }
                if (length) {
#pragma omp simd reduction(+ : paired)
                    for (int n = 0; n < BLOCK; n++) paired += dual[n] * VALUE(row[n]);
                }
#pragma omp simd
                for (int n = 0; n < BLOCK; n++) {
                    double v = tau * SLOPE(row[n]) * dual[n];
                    dual[n] = v;
                    sum[n] += v;
                }
            }
            for (long n = 0; n < b.nodes; n++) bias[start + n] += sum[n];
            project(samples, b.phi, b.phi_stride, phi->rank, w, scratch.sums);
        }
        add_up(samples, phi->rank, scratch.sums, D + first, Y->samples);
    }
    if (length) *length = paired;
    free_scratch(&scratch);
    return 0;
}

/* f += sum_j weight_j sigma(u_j) for stages with bases phi_j, of one layer or of many; f is nodes x samples. */
int advance(const struct label_space *Y, long stages, const struct basis *const *phi, const double *const *a,
            const double *const *C, const double *weight, double *f) {
    struct scratch scratch;
    double u[CHUNK * BLOCK], total[CHUNK * BLOCK];
    long rank = 1;
    for (long j = 0; j < stages; j++) rank = phi[j]->rank > rank ? phi[j]->rank : rank;
    if (!new_scratch(&scratch, rank, rank)) return 1;
    for (long start = 0; start < Y->nodes; start += BLOCK)
        CHUNKS(Y) {
            memset(total, 0, sizeof total);
            for (long j = 0; j < stages; j++) {
                struct block b = block_at(start, Y, phi[j], phi[j], a[j], &scratch);
                double factor = weight[j];
                affine(samples, b.phi, b.phi_stride, phi[j]->rank, b.a, C[j] + first, Y->samples, u);
#pragma omp simd
                for (int i = 0; i < samples * BLOCK; i++) total[i] += factor * VALUE(u[i]);
            }
            long nodes = Y->nodes - start < BLOCK ? Y->nodes - start : BLOCK;
            for (long n = 0; n < nodes; n++)
                for (long s = 0; s < samples; s++) f[(start + n) * Y->samples + first + s] += total[s * BLOCK + n];
        }
    free_scratch(&scratch);
    return 0;
}

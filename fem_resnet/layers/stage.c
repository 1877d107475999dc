/* Stage of a layer, compiled: what layer.Stage does for values, in the same notation, and to the same numbers.

   Put in front: REAL, the type of what is evaluated at the nodes; the vectorised functions of the C library; VALUE(s) and
   SLOPE(s), which are sigma and sigma'. Coefficients, sums over nodes and f are doubles whatever REAL is.

   A block of nodes goes through all of a stage while u, sigma and the block's rows of Phi and Psi are in the first-level
   cache: nothing of size nodes x samples is but f and lambda, where they are wanted. With few samples lanes of a vector
   are nodes, and sums over nodes are kept one a lane; with many they are samples. In both orders products are tiles in
   registers of 4 x 4 vectors; 4 x 3 where there are 16 registers, not 32, and lanes are samples.

   f and lambda may be packed, one chunk of samples after the other: where a node's samples fill a page, a chunk's part of
   each is on a page of its own, and a stage would wait for nearly every line of it.

   Coefficients have one sample after the other: those of sample s begin at `C + s * ld`, ld at least the rank. */

#include <stdlib.h>
#include <string.h>

#if defined __AVX512F__
#define VECTOR 64
#elif defined __AVX__
#define VECTOR 32
#else
#define VECTOR 16
#endif

#define LANES ((int)(VECTOR / sizeof(REAL)))
#define BLOCK 64  /* nodes */
#define WIDE (BLOCK / LANES < 8 ? BLOCK / LANES : 8)
#define ACROSS (VECTOR == 64 ? 4 : 3)  /* vectors of samples in a tile: its sums, operands and a factor stay in registers */
#define CHUNK (ACROSS * LANES)  /* samples, where they are many */
#define SLAB 64  /* functions of a basis */
#define UNROLL _Pragma("GCC unroll 8")
#define ALWAYS static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(VECTOR)));
typedef REAL loose __attribute__((vector_size(VECTOR), aligned(sizeof(REAL)), may_alias));
typedef double sums __attribute__((vector_size(VECTOR / sizeof(REAL) * sizeof(double)), aligned(64)));
typedef double loose_sums __attribute__((vector_size(VECTOR / sizeof(REAL) * sizeof(double)), aligned(8), may_alias));

ALWAYS vec get(const REAL *x) { return *(const loose *)x; }
ALWAYS void put(REAL *x, vec v) { *(loose *)x = v; }

/* A basis at the nodes: column k begins at values + k * stride. */
struct basis {
    const REAL *values;
    long rank, stride;
};

struct label_space {
    long nodes;
    long samples;
    const REAL *weights;
    long packed; /* whether f and lambda have one chunk of samples after the other, or are nodes x samples: 1 or 0 */
};

struct scratch {
    REAL *coefficients[2]; /* of many samples, chunk by chunk: rank x CHUNK */
    sums *sums;            /* rank x LANES; or doubles, chunk by chunk: rank x CHUNK */
    REAL *phi, *psi;       /* of the last block, filled up by zeros */
    REAL a[BLOCK], weights[BLOCK];
};

/* Kept from stage to stage: to free it each time leaves holes that the system does not get back. */
static _Thread_local char *kept;
static _Thread_local size_t kept_size;

static int get_scratch(struct scratch *scratch, long phi, long psi, long samples) {
    const long rank = phi > psi ? phi : psi, chunks = (samples + CHUNK - 1) / CHUNK;
    const size_t chunk = rank * CHUNK, few = rank * LANES * sizeof(sums), many = chunks * chunk * sizeof(double);
    const size_t size = (few > many ? few : many) + 2 * chunks * chunk * sizeof(REAL) + (phi + psi) * BLOCK * sizeof(REAL);
    if (size > kept_size) {
        free(kept);
        kept = aligned_alloc(64, (size + 63) / 64 * 64);
        kept_size = kept ? size : 0;
    }
    char *memory = kept;
    scratch->sums = (sums *)memory;
    if (!memory) return 0;
    memory += few > many ? few : many;
    for (int i = 0; i < 2; i++, memory += chunks * chunk * sizeof(REAL)) scratch->coefficients[i] = (REAL *)memory;
    scratch->phi = (REAL *)memory;
    scratch->psi = scratch->phi + phi * BLOCK;
    return 1;
}

/* -- few samples: lanes are nodes; u, here, is samples x BLOCK ---------------------------------------------------------- */

/* What a block of nodes reads; the last block, if it is not full, from copies that zeros fill up. */
struct block {
    long start, nodes;
    const REAL *phi, *psi, *a, *weights;
    long phi_stride, psi_stride;
};

static void fill_up(REAL *copy, const REAL *values, long columns, long stride, long nodes) {
    for (long k = 0; k < columns; k++) {
        memset(copy + k * BLOCK, 0, BLOCK * sizeof(REAL));
        memcpy(copy + k * BLOCK, values + k * stride, nodes * sizeof(REAL));
    }
}

static struct block block_at(long start, const struct label_space *Y, const struct basis *phi, const struct basis *psi,
                             const REAL *a, struct scratch *scratch) {
    long nodes = Y->nodes - start;
    if (nodes >= BLOCK)
        return (struct block){start, BLOCK, phi->values + start, psi->values + start, a + start, Y->weights + start,
                              phi->stride, psi->stride};
    fill_up(scratch->phi, phi->values + start, phi->rank, phi->stride, nodes);
    fill_up(scratch->psi, psi->values + start, psi->rank, psi->stride, nodes);
    fill_up(scratch->a, a + start, 1, 0, nodes);
    fill_up(scratch->weights, Y->weights + start, 1, 0, nodes);
    return (struct block){start, nodes, scratch->phi, scratch->psi, scratch->a, scratch->weights, BLOCK, BLOCK};
}

/* u = a - Phi C on a tile of `vectors` <= 8 vectors of nodes and of `samples` <= 4 samples. */
ALWAYS void affine_tile(int samples, int vectors, int ahead, const REAL *restrict phi, long stride, long rank,
                        const REAL *restrict a, const double *restrict C, long ldc, REAL *restrict u) {
    vec sum[4][8];
    UNROLL
    for (int s = 0; s < samples; s++)
        UNROLL
        for (int v = 0; v < vectors; v++) sum[s][v] = get(a + v * LANES);
    for (long k = 0; k < rank; k++) {
        vec p[8];
        UNROLL
        for (int v = 0; v < vectors; v++) {
            p[v] = get(phi + k * stride + v * LANES);
            if (ahead) __builtin_prefetch(phi + k * stride + v * LANES + BLOCK, 0, 2);
        }
        UNROLL
        for (int s = 0; s < samples; s++) {
            REAL c = C[s * ldc + k];
            UNROLL
            for (int v = 0; v < vectors; v++) sum[s][v] -= c * p[v];
        }
    }
    UNROLL
    for (int s = 0; s < samples; s++)
        UNROLL
        for (int v = 0; v < vectors; v++) put(u + s * BLOCK + v * LANES, sum[s][v]);
}

ALWAYS void affine(int ahead, long samples, const REAL *phi, long stride, long rank, const REAL *a, const double *C, long ldc,
                   REAL *u) {
#define AFFINE(count, vectors)                                                                                            \
    for (long n = 0; n < BLOCK; n += vectors * LANES)                                                                      \
    affine_tile(count, vectors, ahead, phi + n, stride, rank, a + n, C + s * ldc, ldc, u + s * BLOCK + n)
    long s = 0;
    for (; s + 4 <= samples; s += 4) AFFINE(4, 4);
    switch (samples - s) {
    case 3: AFFINE(3, 4); break;
    case 2: AFFINE(2, 4); break;
    case 1: AFFINE(1, WIDE); break;
    }
}

/* total += Psi^T v for `ranks` <= 8 functions and `samples` <= 4 samples, over a block of nodes. */
ALWAYS void project_tile(int ranks, int samples, const REAL *restrict psi, long stride, const REAL *restrict v,
                         sums *restrict total) {
    vec sum[8][4] = {{{0}}};
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
        for (int s = 0; s < samples; s++) total[k * LANES + s] += __builtin_convertvector(sum[k][s], sums);
}

#define PROJECT(ranks, samples) project_tile(ranks, samples, psi + k * stride, stride, v + s * BLOCK, total + k * LANES + s)
#define PROJECT_ROWS(samples, most)                                                                                       \
    do {                                                                                                                   \
        long k = 0;                                                                                                        \
        for (; k + most <= rank; k += most) PROJECT(most, samples);                                                        \
        for (; k < rank; k++) PROJECT(1, samples);                                                                         \
    } while (0)

static void project(long samples, const REAL *psi, long stride, long rank, const REAL *v, sums *total) {
    long s = 0;
    for (; s + 4 <= samples; s += 4) PROJECT_ROWS(4, 4);
    switch (samples - s) {
    case 3: PROJECT_ROWS(3, 4); break;
    case 2: PROJECT_ROWS(2, 4); break;
    case 1: PROJECT_ROWS(1, 8); break;
    }
}

static void add_up(long samples, long rank, const sums *total, double *Q, long ldq) {
    for (long s = 0; s < samples; s++)
        for (long k = 0; k < rank; k++) {
            double sum = 0.0;
            for (int lane = 0; lane < LANES; lane++) sum += total[k * LANES + s][lane];
            Q[s * ldq + k] = sum;
        }
}

static void rate_of_few(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a,
                        const double *C, long ldc, double tau, double *Q, long ldq, double *s_out, double *f, double weight,
                        struct scratch *scratch) {
    const long samples = Y->samples;
    const REAL length = tau;
    REAL u[LANES * BLOCK];
    memset(scratch->sums, 0, psi->rank * LANES * sizeof(sums));
    for (long start = 0; start < Y->nodes; start += BLOCK) {
        struct block b = block_at(start, Y, phi, psi, a, scratch);
        affine(1, samples, b.phi, b.phi_stride, phi->rank, b.a, C, ldc, u);
        for (long s = 0; s < samples; s++) {
            REAL *row = u + s * BLOCK;
#pragma omp simd
            for (int n = 0; n < BLOCK; n++) row[n] = length * VALUE(row[n]);
            if (s_out)
                for (long n = 0; n < b.nodes; n++) s_out[(start + n) * samples + s] = row[n];
            if (f)
                for (long n = 0; n < b.nodes; n++) f[(start + n) * samples + s] += weight * row[n];
#pragma omp simd
            for (int n = 0; n < BLOCK; n++) row[n] *= b.weights[n];
        }
        if (Q) project(samples, b.psi, b.psi_stride, psi->rank, u, scratch->sums);
    }
    if (Q) add_up(samples, psi->rank, scratch->sums, Q, ldq);
}

static void transpose_of_few(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a,
                             const double *C, long ldc, double tau, const double *x, long ldx, const REAL *lambda, double *D,
                             double *bias, double weight, double *length, struct scratch *scratch) {
    static const REAL zero[BLOCK];
    const long samples = Y->samples;
    const REAL tau_ = tau;
    REAL u[LANES * BLOCK], w[LANES * BLOCK];
    double paired = 0.0;
    memset(scratch->sums, 0, phi->rank * LANES * sizeof(sums));
    for (long start = 0; start < Y->nodes; start += BLOCK) {
        struct block b = block_at(start, Y, phi, psi, a, scratch);
        REAL sum[BLOCK] = {0};
        affine(1, samples, b.phi, b.phi_stride, phi->rank, b.a, C, ldc, u);
        affine(0, samples, b.psi, b.psi_stride, psi->rank, zero, x, ldx, w); /* -Psi x */
        for (long s = 0; s < samples; s++) {
            REAL *row = u + s * BLOCK, *dual = w + s * BLOCK;
#pragma omp simd
            for (int n = 0; n < BLOCK; n++) dual[n] *= -b.weights[n];
            if (lambda) {
                const REAL *column = lambda + s * Y->nodes + start;
                const REAL factor = x[s * ldx + psi->rank];
#pragma omp simd
                for (int n = 0; n < b.nodes; n++) dual[n] += factor * column[n];
            }
            if (length) {
#pragma omp simd reduction(+ : paired)
                for (int n = 0; n < BLOCK; n++) paired += dual[n] * VALUE(row[n]);
            }
#pragma omp simd
            for (int n = 0; n < BLOCK; n++) {
                REAL v = tau_ * SLOPE(row[n]) * dual[n];
                dual[n] = v;
                sum[n] += v;
            }
        }
        for (long n = 0; n < b.nodes; n++) bias[start + n] += weight * sum[n];
        project(samples, b.phi, b.phi_stride, phi->rank, w, scratch->sums);
    }
    add_up(samples, phi->rank, scratch->sums, D, phi->rank);
    if (length) *length = paired;
}

/* -- many samples: lanes are samples; u, here, is nodes x CHUNK --------------------------------------------------------- */


/* sum_i = sum over l of x[l * by_l + i * by_i] y_l for `rows` <= 4 rows, each of `vectors` <= 4 vectors of samples. If not
   0, `ahead` says how far behind x begins what is asked for on the way. */
ALWAYS void product_tile(int rows, int vectors, const REAL *restrict x, long by_l, long by_i, const REAL *restrict y,
                         long length, long ahead, vec sum[4][4]) {
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
        for (int j = 0; j < vectors; j++) sum[i][j] = (vec){0};
    for (long l = 0; l < length; l++) {
        vec q[4];
        if (ahead) __builtin_prefetch(x + l * by_l + ahead, 0, 2);
        UNROLL
        for (int j = 0; j < vectors; j++) q[j] = get(y + l * CHUNK + j * LANES);
        UNROLL
        for (int i = 0; i < rows; i++) {
            REAL c = x[l * by_l + i * by_i];
            UNROLL
            for (int j = 0; j < vectors; j++) sum[i][j] += c * q[j];
        }
    }
}

/* With many functions a block of Phi is more than a processor foresees by itself. So that of the next block, `ahead` nodes
   on, is asked for while the first samples are multiplied, and Psi's too if it is another; where `ahead` is 0, nothing is.

   u = a + Phi c, or u += Phi c if a is NULL, on a tile of nodes. */
ALWAYS void affine_rows(int nodes, int vectors, long ahead, const REAL *phi, long stride, long rank, const REAL *a,
                        const REAL *c, REAL *u) {
    vec sum[4][4];
    product_tile(nodes, vectors, phi, stride, 1, c, rank, ahead, sum);
    UNROLL
    for (int i = 0; i < nodes; i++)
        UNROLL
        for (int j = 0; j < vectors; j++) {
            REAL *place = u + i * CHUNK + j * LANES;
            put(place, sum[i][j] + (a ? a[i] + (vec){0} : get(place)));
        }
}

/* total += Psi^T v for `ranks` <= 4 functions, over a block of nodes. */
ALWAYS void project_columns(int ranks, int vectors, long ahead, const REAL *psi, long stride, long nodes, const REAL *v,
                            double *total) {
    vec sum[4][4];
    if (ahead)
        for (int i = 0; i < ranks; i++)
            for (int n = 0; n < BLOCK; n += 64 / sizeof(REAL)) __builtin_prefetch(psi + i * stride + ahead + n, 0, 2);
    product_tile(ranks, vectors, psi, 1, stride, v, nodes, 0, sum);
    UNROLL
    for (int i = 0; i < ranks; i++)
        UNROLL
        for (int j = 0; j < vectors; j++)
            *(loose_sums *)(total + i * CHUNK + j * LANES) += __builtin_convertvector(sum[i][j], sums);
}

#define TILES(tile, count, vectors)                                                                                       \
    do {                                                                                                                   \
        long i = 0;                                                                                                        \
        for (; i + 4 <= count; i += 4) tile(4, vectors);                                                                   \
        switch (count - i) {                                                                                               \
        case 3: tile(3, vectors); break;                                                                                   \
        case 2: tile(2, vectors); break;                                                                                   \
        case 1: tile(1, vectors); break;                                                                                   \
        }                                                                                                                  \
    } while (0)
#define ALL_TILES(tile, count)                                                                                            \
    switch (vectors) {                                                                                                     \
    case 4: TILES(tile, count, 4); break;                                                                                  \
    case 3: TILES(tile, count, 3); break;                                                                                  \
    case 2: TILES(tile, count, 2); break;                                                                                  \
    case 1: TILES(tile, count, 1); break;                                                                                  \
    }

static void affine_of_many(int vectors, long ahead, const REAL *phi, long stride, long rank, long nodes, const REAL *a,
                           const REAL *c, REAL *u) {
#define AFFINE_ROWS(rows, vectors) \
    affine_rows(rows, vectors, ahead, phi + k * stride + i, stride, slab, k ? NULL : a + i, c + k * CHUNK, u + i * CHUNK)
    /* A slab's rows of c are in the first-level cache, and its pages are known. */
    for (long k = 0; k < rank; k += SLAB) {
        const long slab = rank - k < SLAB ? rank - k : SLAB;
        ALL_TILES(AFFINE_ROWS, nodes)
    }
}

static void project_many(int vectors, long ahead, const REAL *psi, long stride, long rank, long nodes, const REAL *v,
                         double *total) {
#define PROJECT_COLUMNS(ranks, vectors) \
    project_columns(ranks, vectors, ahead, psi + i * stride, stride, nodes, v, total + i * CHUNK)
    ALL_TILES(PROJECT_COLUMNS, rank)
}

/* A chunk of samples, the last filled up by zeros to whole vectors. */
#define CHUNKS(Y)                                                                                                         \
    for (long first = 0, samples, vectors; samples = Y->samples - first < CHUNK ? Y->samples - first : CHUNK,               \
              vectors = (samples + LANES - 1) / LANES, first < Y->samples; first += CHUNK)

#define BLOCKS(Y) \
    for (long start = 0, nodes; nodes = Y->nodes - start < BLOCK ? Y->nodes - start : BLOCK, start < Y->nodes; start += BLOCK)

static void turn(long samples, long rank, const double *C, long ldc, double factor, REAL *c) {
    memset(c, 0, rank * CHUNK * sizeof(REAL));
    for (long s = 0; s < samples; s++)
        for (long k = 0; k < rank; k++) c[k * CHUNK + s] = factor * C[s * ldc + k];
}

static void turn_back(long samples, long rank, const double *total, double *Q, long ldq) {
    for (long s = 0; s < samples; s++)
        for (long k = 0; k < rank; k++) Q[s * ldq + k] = total[k * CHUNK + s];
}

/* Where the coefficients or sums of a chunk begin. */
#define OF(chunk, rank) ((chunk) + first * (rank))

/* Where f or lambda has the samples of a chunk at a node. */
ALWAYS long place(const struct label_space *Y, long node, long first, long samples) {
    return Y->packed ? first * Y->nodes + node * samples : node * Y->samples + first;
}

static void rate_of_many(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a,
                         const double *C, long ldc, double tau, double *Q, long ldq, double *s_out, double *f, double weight,
                         struct scratch *scratch) {
    REAL u[BLOCK * CHUNK] __attribute__((aligned(64))), *c = scratch->coefficients[0];
    double *total = (double *)scratch->sums;
    const REAL length = tau;
    const long psi_ahead = psi->values == phi->values ? 0 : BLOCK;
    CHUNKS(Y) {
        turn(samples, phi->rank, C + first * ldc, ldc, -1.0, OF(c, phi->rank));
        memset(OF(total, psi->rank), 0, psi->rank * CHUNK * sizeof(double));
    }
    BLOCKS(Y)
        CHUNKS(Y) {
            affine_of_many(vectors, first ? 0 : BLOCK, phi->values + start, phi->stride, phi->rank, nodes, a + start,
                           OF(c, phi->rank), u);
            for (long n = 0; n < nodes; n++) {
                REAL *row = u + n * CHUNK;
                const long width = vectors * LANES, at = place(Y, start + n, first, samples);
#pragma omp simd
                for (int s = 0; s < width; s++) row[s] = length * VALUE(row[s]);
                if (s_out)
                    for (long s = 0; s < samples; s++) s_out[at + s] = row[s];
                if (f)
                    for (long s = 0; s < samples; s++) f[at + s] += weight * row[s];
                const REAL w = Y->weights[start + n];
#pragma omp simd
                for (int s = 0; s < width; s++) row[s] *= w;
            }
            if (Q)
                project_many(vectors, first ? 0 : psi_ahead, psi->values + start, psi->stride, psi->rank, nodes, u,
                             OF(total, psi->rank));
        }
    if (Q)
        CHUNKS(Y) turn_back(samples, psi->rank, OF(total, psi->rank), Q + first * ldq, ldq);
}

static void transpose_of_many(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a,
                              const double *C, long ldc, double tau, const double *x, long ldx, const REAL *lambda, double *D,
                              double *bias, double weight, double *length, struct scratch *scratch) {
    static const REAL zero[BLOCK];
    REAL u[BLOCK * CHUNK] __attribute__((aligned(64))), w[BLOCK * CHUNK] __attribute__((aligned(64))), factor[CHUNK];
    REAL *c = scratch->coefficients[0], *y = scratch->coefficients[1];
    double *total = (double *)scratch->sums, paired = 0.0;
    const REAL tau_ = tau;
    const long psi_ahead = psi->values == phi->values ? 0 : BLOCK;
    CHUNKS(Y) {
        turn(samples, phi->rank, C + first * ldc, ldc, -1.0, OF(c, phi->rank));
        turn(samples, psi->rank, x + first * ldx, ldx, 1.0, OF(y, psi->rank));
        memset(OF(total, phi->rank), 0, phi->rank * CHUNK * sizeof(double));
    }
    BLOCKS(Y)
        CHUNKS(Y) {
            const long width = vectors * LANES;
            if (lambda)
                for (long s = 0; s < samples; s++) factor[s] = x[(first + s) * ldx + psi->rank];
            affine_of_many(vectors, first ? 0 : BLOCK, phi->values + start, phi->stride, phi->rank, nodes, a + start,
                           OF(c, phi->rank), u);
            affine_of_many(vectors, first ? 0 : psi_ahead, psi->values + start, psi->stride, psi->rank, nodes, zero,
                           OF(y, psi->rank), w); /* Psi x */
            for (long n = 0; n < nodes; n++) {
                REAL *row = u + n * CHUNK, *dual = w + n * CHUNK, sum = 0;
                const REAL node = Y->weights[start + n];
#pragma omp simd
                for (int s = 0; s < width; s++) dual[s] *= node;
                if (lambda) {
                    const REAL *adjoint = lambda + place(Y, start + n, first, samples);
#pragma omp simd
                    for (int s = 0; s < samples; s++) dual[s] += factor[s] * adjoint[s];
                }
                if (length) {
#pragma omp simd reduction(+ : paired)
                    for (int s = 0; s < samples; s++) paired += dual[s] * VALUE(row[s]);
                }
#pragma omp simd reduction(+ : sum)
                for (int s = 0; s < width; s++) {
                    REAL v = tau_ * SLOPE(row[s]) * dual[s];
                    dual[s] = v;
                    sum += v;
                }
                bias[start + n] += weight * sum;
            }
            project_many(vectors, 0, phi->values + start, phi->stride, phi->rank, nodes, w, OF(total, phi->rank));
        }
    CHUNKS(Y) turn_back(samples, phi->rank, OF(total, phi->rank), D + first * phi->rank, phi->rank);
    if (length) *length = paired;
}

/* -- either ----------------------------------------------------------------------------------------------------------- */

/* Whether lambda is wanted with the nodes innermost; else the samples are. */
int nodes_are_innermost(const struct label_space *Y) { return Y->samples < LANES; }

/* Samples of a chunk. */
long chunk(void) { return CHUNK; }

/* Q = Psi^T M s for s = tau sigma(u), this rank's part; not if Q is NULL. `s_out` takes s, f, both nodes x samples, has
   weight * s added; either may be NULL, `s_out` is where fields are packed. */
int rate(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a, const double *C,
         long ldc, double tau, double *Q, long ldq, double *s_out, double *f, double weight) {
    struct scratch scratch;
    if (!get_scratch(&scratch, phi->rank, psi->rank, Y->samples)) return 1;
    (nodes_are_innermost(Y) ? rate_of_few : rate_of_many)(Y, phi, psi, a, C, ldc, tau, Q, ldq, s_out, f, weight, &scratch);
    return 0;
}

/* For w = M Psi x + x_q lambda, x_q behind the coefficients x of each sample, and v = tau sigma'(u) w: D = Phi^T v, this
   rank's part, and weight * sum over samples of v added to `bias`; `length`, or NULL, takes <w, sigma(u)>, this rank's
   part. lambda may be NULL for 0. */
int transpose(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a, const double *C,
              long ldc, double tau, const double *x, long ldx, const REAL *lambda, double *D, double *bias, double weight,
              double *length) {
    struct scratch scratch;
    if (!get_scratch(&scratch, phi->rank, psi->rank, Y->samples)) return 1;
    (nodes_are_innermost(Y) ? transpose_of_few : transpose_of_many)(Y, phi, psi, a, C, ldc, tau, x, ldx, lambda, D, bias,
                                                                    weight, length, &scratch);
    return 0;
}

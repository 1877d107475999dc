/* Stage of a layer, compiled: what `Stage` of stage.py does for values, in the same notation and to the same numbers.

   Python puts in front of this file: REAL, the type of values at the nodes; the vectorised functions of the C library;
   VALUE(s) and SLOPE(s), which are sigma and sigma'. Coefficients, sums over nodes and f are doubles whatever REAL is.

   NODES nodes, a node block, go through all of a stage while u, sigma and the block's rows of Phi and Psi are in the
   first-level cache. So of all arrays with nodes x samples numbers only f and lambda exist, where they are needed. With few
   samples, the lanes of a vector are nodes, and a sum over nodes is kept for each lane. With many samples, the lanes are
   samples. In both cases products are made of tiles of 4 x 4 vectors, which stay in registers; of 4 x 3 vectors where there
   are 16 registers instead of 32 and the lanes are samples.

   f and lambda may be packed, one chunk of samples after the other. Where the samples of a node fill a page of memory, the
   part of each node that belongs to a chunk is on a page of its own, and without packing a stage would wait for nearly every
   line of it.

   Coefficients of one sample stand together: those of sample s begin at `C + s * ldc`, with ldc at least the rank.

   Sections: types and memory; few samples; many samples; the functions that Python and layer.c call. */

#include <stdlib.h>
#include <string.h>

#if defined __AVX512F__
#define VECTOR 64
#elif defined __AVX__
#define VECTOR 32
#else
#define VECTOR 16
#endif

#define LINE 64 /* bytes of a cache line, and of the widest vector: arrays begin at multiples of it */
#define LANES ((int)(VECTOR / sizeof(REAL)))
#define NODES 64  /* nodes of a node block */
#define WIDE (NODES / LANES < 8 ? NODES / LANES : 8)
#define ACROSS (VECTOR == 64 ? 4 : 3)  /* vectors of samples in a tile: its sums, operands and a factor stay in registers */
#define CHUNK (ACROSS * LANES)  /* samples of a chunk, where there are many samples */
#define SLAB 64  /* functions of a basis that are multiplied before the next ones */
#define UNROLL _Pragma("GCC unroll 8")
#define ALWAYS static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(VECTOR)));
typedef REAL loose __attribute__((vector_size(VECTOR), aligned(sizeof(REAL)), may_alias));
/* One double for each lane of a vector: one vector, or two where REAL is float. Never aligned to more than its size. */
typedef double sums __attribute__((vector_size(LANES * sizeof(double)), aligned(VECTOR)));
typedef double loose_sums __attribute__((vector_size(LANES * sizeof(double)), aligned(sizeof(double)), may_alias));
_Static_assert(LINE % VECTOR == 0 && sizeof(sums) % VECTOR == 0, "arrays of vectors have each of them aligned");

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
    long packed; /* 1 if f and lambda are packed, 0 if they are nodes x samples */
};

struct scratch {
    REAL *coefficients[2]; /* with many samples, chunk by chunk: rank x CHUNK */
    sums *sums;            /* rank x LANES; with many samples doubles, chunk by chunk: rank x CHUNK */
    REAL *phi, *psi;       /* the last node block, filled up by zeros; so are a and the weights */
    REAL a[NODES], weights[NODES];
};

/* This memory is kept from stage to stage. Freeing it each time would leave holes that the system does not get back. */
static _Thread_local char *kept;
static _Thread_local size_t kept_size;

static int get_scratch(struct scratch *scratch, long phi, long psi, long samples) {
    const long rank = phi > psi ? phi : psi, chunks = (samples + CHUNK - 1) / CHUNK;
    const size_t chunk = rank * CHUNK, few = rank * LANES * sizeof(sums), many = chunks * chunk * sizeof(double);
    const size_t size = (few > many ? few : many) + 2 * chunks * chunk * sizeof(REAL) + (phi + psi) * NODES * sizeof(REAL);
    if (size > kept_size) {
        free(kept);
        kept = aligned_alloc(LINE, (size + LINE - 1) / LINE * LINE);
        kept_size = kept ? size : 0;
    }
    char *memory = kept;
    scratch->sums = (sums *)memory;
    if (!memory) return 0;
    memory += few > many ? few : many;
    for (int i = 0; i < 2; i++, memory += chunks * chunk * sizeof(REAL)) scratch->coefficients[i] = (REAL *)memory;
    scratch->phi = (REAL *)memory;
    scratch->psi = scratch->phi + phi * NODES;
    return 1;
}

/* -- few samples: lanes are nodes, and u is samples x NODES ------------------------------------------------------------- */

/* The data of a node block. If the last block is not full, they are copies, filled up by zeros. */
struct node_block {
    long start, nodes;
    const REAL *phi, *psi, *a, *weights;
    long phi_stride, psi_stride;
};

static void fill_up(REAL *copy, const REAL *values, long columns, long stride, long nodes) {
    for (long k = 0; k < columns; k++) {
        memset(copy + k * NODES, 0, NODES * sizeof(REAL));
        memcpy(copy + k * NODES, values + k * stride, nodes * sizeof(REAL));
    }
}

static struct node_block node_block_at(long start, const struct label_space *Y, const struct basis *phi,
                                       const struct basis *psi, const REAL *a, struct scratch *scratch) {
    long nodes = Y->nodes - start;
    if (nodes >= NODES)
        return (struct node_block){start, NODES, phi->values + start, psi->values + start, a + start, Y->weights + start,
                                   phi->stride, psi->stride};
    fill_up(scratch->phi, phi->values + start, phi->rank, phi->stride, nodes);
    fill_up(scratch->psi, psi->values + start, psi->rank, psi->stride, nodes);
    fill_up(scratch->a, a + start, 1, 0, nodes);
    fill_up(scratch->weights, Y->weights + start, 1, 0, nodes);
    return (struct node_block){start, nodes, scratch->phi, scratch->psi, scratch->a, scratch->weights, NODES, NODES};
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
            if (ahead) __builtin_prefetch(phi + k * stride + v * LANES + NODES, 0, 2);
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
        for (int v = 0; v < vectors; v++) put(u + s * NODES + v * LANES, sum[s][v]);
}

ALWAYS void affine(int ahead, long samples, const REAL *phi, long stride, long rank, const REAL *a, const double *C, long ldc,
                   REAL *u) {
#define AFFINE(count, vectors)                                                                                            \
    for (long n = 0; n < NODES; n += vectors * LANES)                                                                      \
    affine_tile(count, vectors, ahead, phi + n, stride, rank, a + n, C + s * ldc, ldc, u + s * NODES + n)
    long s = 0;
    for (; s + 4 <= samples; s += 4) AFFINE(4, 4);
    switch (samples - s) {
    case 3: AFFINE(3, 4); break;
    case 2: AFFINE(2, 4); break;
    case 1: AFFINE(1, WIDE); break;
    }
}

/* total += Psi^T v for `ranks` <= 8 functions and `samples` <= 4 samples, over a node block. */
ALWAYS void project_tile(int ranks, int samples, const REAL *restrict psi, long stride, const REAL *restrict v,
                         sums *restrict total) {
    vec sum[8][4] = {{{0}}};
    for (int n = 0; n < NODES; n += LANES) {
        vec q[4];
        UNROLL
        for (int s = 0; s < samples; s++) q[s] = get(v + s * NODES + n);
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

#define PROJECT(ranks, samples) project_tile(ranks, samples, psi + k * stride, stride, v + s * NODES, total + k * LANES + s)
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
    REAL u[LANES * NODES];
    memset(scratch->sums, 0, psi->rank * LANES * sizeof(sums));
    for (long start = 0; start < Y->nodes; start += NODES) {
        struct node_block b = node_block_at(start, Y, phi, psi, a, scratch);
        affine(1, samples, b.phi, b.phi_stride, phi->rank, b.a, C, ldc, u);
        for (long s = 0; s < samples; s++) {
            REAL *row = u + s * NODES;
#pragma omp simd
            for (int n = 0; n < NODES; n++) row[n] = length * VALUE(row[n]);
            if (s_out)
                for (long n = 0; n < b.nodes; n++) s_out[(start + n) * samples + s] = row[n];
            if (f)
                for (long n = 0; n < b.nodes; n++) f[(start + n) * samples + s] += weight * row[n];
#pragma omp simd
            for (int n = 0; n < NODES; n++) row[n] *= b.weights[n];
        }
        if (Q) project(samples, b.psi, b.psi_stride, psi->rank, u, scratch->sums);
    }
    if (Q) add_up(samples, psi->rank, scratch->sums, Q, ldq);
}

static void transpose_of_few(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a,
                             const double *C, long ldc, double tau, const double *x, long ldx, const REAL *lambda, double *D,
                             double *bias, double weight, double *length, struct scratch *scratch) {
    static const REAL zero[NODES];
    const long samples = Y->samples;
    const REAL tau_ = tau;
    REAL u[LANES * NODES], w[LANES * NODES];
    double paired = 0.0;
    memset(scratch->sums, 0, phi->rank * LANES * sizeof(sums));
    for (long start = 0; start < Y->nodes; start += NODES) {
        struct node_block b = node_block_at(start, Y, phi, psi, a, scratch);
        REAL sum[NODES] = {0};
        affine(1, samples, b.phi, b.phi_stride, phi->rank, b.a, C, ldc, u);
        affine(0, samples, b.psi, b.psi_stride, psi->rank, zero, x, ldx, w); /* -Psi x */
        for (long s = 0; s < samples; s++) {
            REAL *row = u + s * NODES, *back = w + s * NODES;
#pragma omp simd
            for (int n = 0; n < NODES; n++) back[n] *= -b.weights[n];
            if (lambda) {
                const REAL *column = lambda + s * Y->nodes + start;
                const REAL factor = x[s * ldx + psi->rank];
#pragma omp simd
                for (int n = 0; n < b.nodes; n++) back[n] += factor * column[n];
            }
            if (length) {
#pragma omp simd reduction(+ : paired)
                for (int n = 0; n < NODES; n++) paired += back[n] * VALUE(row[n]);
            }
#pragma omp simd
            for (int n = 0; n < NODES; n++) {
                REAL v = tau_ * SLOPE(row[n]) * back[n];
                back[n] = v;
                sum[n] += v;
            }
        }
        for (long n = 0; n < b.nodes; n++) bias[start + n] += weight * sum[n];
        project(samples, b.phi, b.phi_stride, phi->rank, w, scratch->sums);
    }
    add_up(samples, phi->rank, scratch->sums, D, phi->rank);
    if (length) *length = paired;
}

/* -- many samples: lanes are samples, and u is nodes x CHUNK ------------------------------------------------------------ */

/* sum_i = sum over l of x[l * by_l + i * by_i] y_l for `rows` <= 4 rows, each of `vectors` <= 4 vectors of samples. Unless
   `ahead` is 0, the numbers at this distance behind x are fetched into the cache on the way. */
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

/* u = a + Phi c, or u += Phi c if a is NULL, on a tile of nodes.

   With many functions, a processor does not fetch the rows of Phi early enough by itself. So the rows of the next node
   block, `ahead` nodes further on, are fetched while the first samples are multiplied; those of Psi too, if Psi is not Phi.
   Nothing is fetched where `ahead` is 0. */
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

/* total += Psi^T v for `ranks` <= 4 functions, over a node block. */
ALWAYS void project_columns(int ranks, int vectors, long ahead, const REAL *psi, long stride, long nodes, const REAL *v,
                            double *total) {
    vec sum[4][4];
    if (ahead)
        for (int i = 0; i < ranks; i++)
            for (int n = 0; n < NODES; n += LINE / sizeof(REAL)) __builtin_prefetch(psi + i * stride + ahead + n, 0, 2);
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
    /* The rows of c that belong to a slab are in the first-level cache, and its pages are known to the processor. */
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

/* Loop over chunks of samples. The last chunk is filled up by zeros to whole vectors. */
#define CHUNKS(Y)                                                                                                         \
    for (long first = 0, samples, vectors; samples = Y->samples - first < CHUNK ? Y->samples - first : CHUNK,               \
              vectors = (samples + LANES - 1) / LANES, first < Y->samples; first += CHUNK)

#define NODE_BLOCKS(Y) \
    for (long start = 0, nodes; nodes = Y->nodes - start < NODES ? Y->nodes - start : NODES, start < Y->nodes; start += NODES)

static void turn(long samples, long rank, const double *C, long ldc, double factor, REAL *c) {
    memset(c, 0, rank * CHUNK * sizeof(REAL));
    for (long s = 0; s < samples; s++)
        for (long k = 0; k < rank; k++) c[k * CHUNK + s] = factor * C[s * ldc + k];
}

static void turn_back(long samples, long rank, const double *total, double *Q, long ldq) {
    for (long s = 0; s < samples; s++)
        for (long k = 0; k < rank; k++) Q[s * ldq + k] = total[k * CHUNK + s];
}

/* The beginning of the coefficients, or of the sums, of a chunk. */
#define OF(chunk, rank) ((chunk) + first * (rank))

/* The position in f or lambda of the samples of a chunk at a node. */
ALWAYS long place(const struct label_space *Y, long node, long first, long samples) {
    return Y->packed ? first * Y->nodes + node * samples : node * Y->samples + first;
}

static void rate_of_many(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a,
                         const double *C, long ldc, double tau, double *Q, long ldq, double *s_out, double *f, double weight,
                         struct scratch *scratch) {
    REAL u[NODES * CHUNK] __attribute__((aligned(LINE))), *c = scratch->coefficients[0];
    double *total = (double *)scratch->sums;
    const REAL length = tau;
    const long psi_ahead = psi->values == phi->values ? 0 : NODES;
    CHUNKS(Y) {
        turn(samples, phi->rank, C + first * ldc, ldc, -1.0, OF(c, phi->rank));
        memset(OF(total, psi->rank), 0, psi->rank * CHUNK * sizeof(double));
    }
    NODE_BLOCKS(Y)
        CHUNKS(Y) {
            affine_of_many(vectors, first ? 0 : NODES, phi->values + start, phi->stride, phi->rank, nodes, a + start,
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
    static const REAL zero[NODES];
    REAL u[NODES * CHUNK] __attribute__((aligned(LINE))), w[NODES * CHUNK] __attribute__((aligned(LINE))), factor[CHUNK];
    REAL *c = scratch->coefficients[0], *y = scratch->coefficients[1];
    double *total = (double *)scratch->sums, paired = 0.0;
    const REAL tau_ = tau;
    const long psi_ahead = psi->values == phi->values ? 0 : NODES;
    CHUNKS(Y) {
        turn(samples, phi->rank, C + first * ldc, ldc, -1.0, OF(c, phi->rank));
        turn(samples, psi->rank, x + first * ldx, ldx, 1.0, OF(y, psi->rank));
        memset(OF(total, phi->rank), 0, phi->rank * CHUNK * sizeof(double));
    }
    NODE_BLOCKS(Y)
        CHUNKS(Y) {
            const long width = vectors * LANES;
            if (lambda)
                for (long s = 0; s < samples; s++) factor[s] = x[(first + s) * ldx + psi->rank];
            affine_of_many(vectors, first ? 0 : NODES, phi->values + start, phi->stride, phi->rank, nodes, a + start,
                           OF(c, phi->rank), u);
            affine_of_many(vectors, first ? 0 : psi_ahead, psi->values + start, psi->stride, psi->rank, nodes, zero,
                           OF(y, psi->rank), w); /* Psi x */
            for (long n = 0; n < nodes; n++) {
                REAL *row = u + n * CHUNK, *back = w + n * CHUNK, sum = 0;
                const REAL node = Y->weights[start + n];
#pragma omp simd
                for (int s = 0; s < width; s++) back[s] *= node;
                if (lambda) {
                    const REAL *row_of_lambda = lambda + place(Y, start + n, first, samples);
#pragma omp simd
                    for (int s = 0; s < samples; s++) back[s] += factor[s] * row_of_lambda[s];
                }
                if (length) {
#pragma omp simd reduction(+ : paired)
                    for (int s = 0; s < samples; s++) paired += back[s] * VALUE(row[s]);
                }
#pragma omp simd reduction(+ : sum)
                for (int s = 0; s < width; s++) {
                    REAL v = tau_ * SLOPE(row[s]) * back[s];
                    back[s] = v;
                    sum += v;
                }
                bias[start + n] += weight * sum;
            }
            project_many(vectors, 0, phi->values + start, phi->stride, phi->rank, nodes, w, OF(total, phi->rank));
        }
    CHUNKS(Y) turn_back(samples, phi->rank, OF(total, phi->rank), D + first * phi->rank, phi->rank);
    if (length) *length = paired;
}

/* -- the functions that Python and layer.c call ------------------------------------------------------------------------- */

/* Whether lambda must have the nodes innermost in memory; else the samples. */
int nodes_are_innermost(const struct label_space *Y) { return Y->samples < LANES; }

/* The number of samples of a chunk. */
long chunk(void) { return CHUNK; }

/* The value of a stage, s = tau sigma(u): Q = Psi^T M s, the part of this rank, unless Q is NULL. Writes s into `s_out` and
   adds weight * s to f, both nodes x samples; either may be NULL, and `s_out` must be NULL where fields are packed.
   Returns 1 if there is no memory, else 0. */
int rate(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a, const double *C,
         long ldc, double tau, double *Q, long ldq, double *s_out, double *f, double weight) {
    struct scratch scratch;
    if (!get_scratch(&scratch, phi->rank, psi->rank, Y->samples)) return 1;
    (nodes_are_innermost(Y) ? rate_of_few : rate_of_many)(Y, phi, psi, a, C, ldc, tau, Q, ldq, s_out, f, weight, &scratch);
    return 0;
}

/* The transpose of a stage, for w = M Psi x + x_q lambda and v = tau sigma'(u) w, where x_q stands behind the coefficients x
   of each sample: D = Phi^T v, the part of this rank. Adds weight * (sum over samples of v) to `bias`. Unless `length` is
   NULL, it becomes <w, sigma(u)>, the part of this rank. lambda may be NULL for 0. Returns 1 if there is no memory, else
   0. */
int transpose(const struct label_space *Y, const struct basis *phi, const struct basis *psi, const REAL *a, const double *C,
              long ldc, double tau, const double *x, long ldx, const REAL *lambda, double *D, double *bias, double weight,
              double *length) {
    struct scratch scratch;
    if (!get_scratch(&scratch, phi->rank, psi->rank, Y->samples)) return 1;
    (nodes_are_innermost(Y) ? transpose_of_few : transpose_of_many)(Y, phi, psi, a, C, ldc, tau, x, ldx, lambda, D, bias,
                                                                    weight, length, &scratch);
    return 0;
}

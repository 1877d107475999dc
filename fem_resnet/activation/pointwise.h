/* The built-in activations and their derivatives for compiled stages, in the type REAL: `value_NAME` and `slope_NAME`.

   What they are and what they are at joints says activation.py. A NaN comes out as a NaN, so that it is noticed. Next to 0
   and in the tails they are accurate relative to their size: 1 - tanh^2 s would lose all digits from |s| = 19 on. */

static inline REAL value_tanh(REAL s) {
    REAL tail = expm1(-2.0 * fabs(s));
    return copysign(tail / (2.0 + tail), s);
}

static inline REAL slope_tanh(REAL s) {
    REAL tail = exp(-2.0 * fabs(s)), all = 1.0 + tail;
    return 4.0 * tail / (all * all);
}

static inline REAL value_arctan(REAL s) { return atan(s); }

static inline REAL slope_arctan(REAL s) { return 1.0 / (1.0 + s * s); }

static inline REAL value_sigmoid(REAL s) { return 1.0 / (1.0 + exp(-s)); }

static inline REAL slope_sigmoid(REAL s) {
    REAL tail = exp(-fabs(s)), all = 1.0 + tail;
    return tail / (all * all);
}

static inline REAL value_softplus(REAL s) { return (s < 0.0 ? 0.0 : s) + log1p(exp(-fabs(s))); }

static inline REAL slope_softplus(REAL s) { return value_sigmoid(s); }

static inline REAL value_relu(REAL s) { return s < 0.0 ? 0.0 : s; }

static inline REAL slope_relu(REAL s) { return s > 0.0 ? 1.0 : 0.0; }

static inline REAL value_leaky_relu(REAL s) { return s < 0.0 ? 0.1 * s : s; }

static inline REAL slope_leaky_relu(REAL s) { return s > 0.0 ? 1.0 : 0.1; }

#ifdef ALPHA
static inline REAL value_elu(REAL s) {
    REAL left = ALPHA * expm1(s);
    return s > 0.0 ? s : left;
}

static inline REAL slope_elu(REAL s) {
    REAL left = ALPHA * exp(s);
    return s > 0.0 ? 1.0 : left;
}
#endif

static inline REAL value_identity(REAL s) { return s; }

static inline REAL slope_identity(REAL s) { return 1.0; }

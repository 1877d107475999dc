/* The built-in activations and their derivatives for compiled stages: `value_NAME` and `slope_NAME`.

   What they are and what they are at joints says activation.py. A NaN comes out as a NaN, so that it is noticed. Next to 0
   and in the tails they are accurate relative to their size: 1 - tanh^2 s would lose all digits from |s| = 19 on. */

static inline double value_tanh(double s) {
    double tail = expm1(-2.0 * fabs(s));
    return copysign(tail / (2.0 + tail), s);
}

static inline double slope_tanh(double s) {
    double tail = exp(-2.0 * fabs(s)), all = 1.0 + tail;
    return 4.0 * tail / (all * all);
}

static inline double value_arctan(double s) { return atan(s); }

static inline double slope_arctan(double s) { return 1.0 / (1.0 + s * s); }

static inline double value_sigmoid(double s) { return 1.0 / (1.0 + exp(-s)); }

static inline double slope_sigmoid(double s) {
    double tail = exp(-fabs(s)), all = 1.0 + tail;
    return tail / (all * all);
}

static inline double value_softplus(double s) { return (s < 0.0 ? 0.0 : s) + log1p(exp(-fabs(s))); }

static inline double slope_softplus(double s) { return value_sigmoid(s); }

static inline double value_relu(double s) { return s < 0.0 ? 0.0 : s; }

static inline double slope_relu(double s) { return s > 0.0 ? 1.0 : 0.0; }

static inline double value_leaky_relu(double s) { return s < 0.0 ? 0.1 * s : s; }

static inline double slope_leaky_relu(double s) { return s > 0.0 ? 1.0 : 0.1; }

#ifdef ALPHA
static inline double value_elu(double s) {
    double left = ALPHA * expm1(s);
    return s > 0.0 ? s : left;
}

static inline double slope_elu(double s) {
    double left = ALPHA * exp(s);
    return s > 0.0 ? 1.0 : left;
}
#endif

static inline double value_identity(double s) { return s; }

static inline double slope_identity(double s) { return 1.0; }

/* Y = X W^T on a CPU with AVX2 or AVX-512, of a weight of which only the non-zeros are listed, row by row: their
   values, and the column of each in 16 bits, where MKL and torch take 32 or 64.

   Few tokens: LANES numbers of x are gathered for LANES values at a time. More: x lies transposed, (columns, tokens),
   and each value is multiplied with LANES tokens of its column, so that nothing is gathered. */

#include "lanes.h"

typedef struct {
    const void *values;
    const uint16_t *columns; /* LANES more than there are values */
    const int64_t *starts;
    int64_t rows, tokens, width; /* width: of a row of x */
    const float *x;
    float *y; /* (tokens, rows) */
} product;

#define ENTRY(TOKENS, DTYPE)                                                                                          \
    void csr_##TOKENS##_##DTYPE(RUNTIME, const void *values, const uint16_t *columns, const int64_t *starts,          \
                                int64_t rows, int64_t width, int64_t tokens, const float *x, float *y) {              \
        product work = {values, columns, starts, rows, tokens, width, x, y};                                          \
        share(start, number, count, threads, csr_##DTYPE##_##TOKENS, &work, rows);                                    \
    }

/* --- few tokens: x (tokens, width) --- */

#define FEW_TOKENS(DTYPE, TYPE, FLOATS, EXPAND, LOAD_VALUES, ONE)                                                     \
    static float csr_##DTYPE##_dot(const TYPE *values, const uint16_t *columns, int64_t left, const TYPE *end,        \
                                   const float *x) {                                                                  \
        floats even = ZERO, odd = ZERO;                                                                               \
        for (; left >= 2 * LANES; left -= 2 * LANES, values += 2 * LANES, columns += 2 * LANES) {                     \
            ASK_AHEAD(values);                                                                                        \
            ASK_AHEAD(values + LANES);                                                                                \
            ASK_AHEAD(columns);                                                                                       \
            even = MULTIPLY_ADD(FLOATS(LOAD_VALUES(values)), GATHER(x, LOAD_16(columns)), even);                      \
            odd = MULTIPLY_ADD(FLOATS(LOAD_VALUES(values + LANES)), GATHER(x, LOAD_16(columns + LANES)), odd);        \
        }                                                                                                             \
        for (; left > 0; left -= LANES, values += LANES, columns += LANES) {                                          \
            int64_t some = left < LANES ? left : LANES;                                                               \
            floats weights = FLOATS(EXPAND(values, (1u << some) - 1, end));                                           \
            even = MULTIPLY_ADD(weights, GATHER_FIRST(x, LOAD_16(columns), some), even);                              \
        }                                                                                                             \
        return SUM(ADD(even, odd));                                                                                   \
    }                                                                                                                 \
    static void csr_##DTYPE##_few(const void *work, int64_t first, int64_t last) {                                    \
        const product *w = work;                                                                                      \
        const TYPE *values = w->values, *end = values + w->starts[w->rows];                                           \
        for (int64_t row = first; row < last; row++)                                                                  \
            for (int64_t t = 0, start = w->starts[row]; t < w->tokens; t++)                                           \
                w->y[t * w->rows + row] = csr_##DTYPE##_dot(values + start, w->columns + start,                       \
                                                            w->starts[row + 1] - start, end, w->x + t * w->width);    \
    }                                                                                                                 \
    ENTRY(few, DTYPE)

FOR_EACH_DTYPE(FEW_TOKENS)

/* --- more: x (columns, width), GROUPS * LANES tokens of it at a time --- */

#define SOME_TOKENS(DTYPE, TYPE, ONE, GROUPS)                                                                         \
    static void csr_##DTYPE##_##GROUPS(const product *w, int64_t first, int64_t last, int64_t token) {                \
        const TYPE *values = w->values;                                                                               \
        for (int64_t row = first; row < last; row++) {                                                                \
            int64_t place = w->starts[row], stop = w->starts[row + 1];                                                \
            floats even[GROUPS], odd[GROUPS];                                                                         \
            for (int g = 0; g < GROUPS; g++) even[g] = odd[g] = ZERO;                                                 \
            for (; place + 2 <= stop; place += 2) {                                                                   \
                const float *x = w->x + w->columns[place] * w->width + token;                                         \
                const float *next = w->x + w->columns[place + 1] * w->width + token;                                  \
                floats weight = BROADCAST(ONE(values[place])), other = BROADCAST(ONE(values[place + 1]));             \
                for (int g = 0; g < GROUPS; g++) even[g] = MULTIPLY_ADD(weight, LOAD(x + g * LANES), even[g]);        \
                for (int g = 0; g < GROUPS; g++) odd[g] = MULTIPLY_ADD(other, LOAD(next + g * LANES), odd[g]);        \
            }                                                                                                         \
            if (place < stop) {                                                                                       \
                const float *x = w->x + w->columns[place] * w->width + token;                                         \
                floats weight = BROADCAST(ONE(values[place]));                                                        \
                for (int g = 0; g < GROUPS; g++) even[g] = MULTIPLY_ADD(weight, LOAD(x + g * LANES), even[g]);        \
            }                                                                                                         \
            for (int g = 0; g < GROUPS; g++) {                                                                        \
                float sums[LANES];                                                                                    \
                STORE_FLOATS(sums, ADD(even[g], odd[g]));                                                             \
                for (int64_t t = 0; t < LANES && token + g * LANES + t < w->tokens; t++)                              \
                    w->y[(token + g * LANES + t) * w->rows + row] = sums[t];                                          \
            }                                                                                                         \
        }                                                                                                             \
    }

#define MANY_TOKENS(DTYPE, TYPE, FLOATS, EXPAND, LOAD_VALUES, ONE)                                                    \
    SOME_TOKENS(DTYPE, TYPE, ONE, 1)                                                                                  \
    SOME_TOKENS(DTYPE, TYPE, ONE, 2)                                                                                  \
    SOME_TOKENS(DTYPE, TYPE, ONE, 4)                                                                                  \
    static void csr_##DTYPE##_many(const void *work, int64_t first, int64_t last) {                                   \
        const product *w = work;                                                                                      \
        int64_t token = 0;                                                                                            \
        for (; token + 4 * LANES <= w->width; token += 4 * LANES) csr_##DTYPE##_4(w, first, last, token);             \
        for (; token + 2 * LANES <= w->width; token += 2 * LANES) csr_##DTYPE##_2(w, first, last, token);             \
        for (; token < w->width; token += LANES) csr_##DTYPE##_1(w, first, last, token);                              \
    }                                                                                                                 \
    ENTRY(many, DTYPE)

FOR_EACH_DTYPE(MANY_TOKENS)

/* Of `csr_many_*` the width is a multiple of this. */
int lanes(void) { return LANES; }

/* --- the columns of a bitmask's set bits, for the above --- */

void list_columns(const uint8_t *bitmask, int64_t rows, int64_t row_bytes, uint16_t *columns) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t byte = 0; byte < row_bytes; byte++)
            for (unsigned bits = bitmask[row * row_bytes + byte]; bits; bits &= bits - 1)
                *columns++ = (uint16_t)(8 * byte + __builtin_ctz(bits));
}

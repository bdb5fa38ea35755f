/* Weights packed as values and bitmask, on a CPU with AVX2 or AVX-512: unpacking, and Y = X W^T for few tokens.

   Bit b of byte j of a row says whether column 8 j + b is kept; the values lie row by row. A group of LANES columns
   takes its next popcount(bits) values and spreads them over the lanes whose bits are set ("expand"), so a weight is
   read as it lies in memory: n d + N / 8 bytes for n of N weights of d bytes, where a dense product reads N d. */

#include "lanes.h"

/* --- a group of columns --- */

static inline unsigned group_bits(const uint8_t *bits, int64_t column) {
#if LANES == 16
    uint16_t found;
    memcpy(&found, bits + column / 8, 2);
    return found;
#else
    return bits[column / 8];
#endif
}

static inline unsigned last_bits(const uint8_t *bits, int64_t column, int64_t columns) {
    unsigned found = bits[column / 8];
    if (columns - column > 8) found |= (unsigned)bits[column / 8 + 1] << 8;
    return found & ((1u << (columns - column)) - 1);
}

/* --- row starts: where the values of each row begin --- */

void row_starts(const uint8_t *bitmask, int64_t rows, int64_t row_bytes, int64_t *starts) {
    int64_t total = 0;
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *bits = bitmask + row * row_bytes;
        int64_t byte = 0;
        starts[row] = total;
        for (; byte + 8 <= row_bytes; byte += 8) {
            uint64_t word;
            memcpy(&word, bits + byte, 8);
            total += __builtin_popcountll(word);
        }
        for (; byte < row_bytes; byte++) total += __builtin_popcount(bits[byte]);
    }
    starts[rows] = total;
}

/* --- unpacking: out (rows, columns) --- */

typedef struct {
    const void *values;
    const uint8_t *bitmask;
    const int64_t *starts;
    int64_t rows, columns;
    void *out;
} unpacking;

#define UNPACK(NAME, TYPE, WHOLE_GROUPS)                                                                  \
    static void NAME##_rows(const void *work, int64_t first, int64_t last) {                                    \
        const unpacking *w = work;                                                                        \
        const TYPE *end = (const TYPE *)w->values + w->starts[w->rows];                                   \
        for (int64_t row = first; row < last; row++) {                                                    \
            const TYPE *values = (const TYPE *)w->values + w->starts[row];                                \
            const uint8_t *bits = w->bitmask + row * ((w->columns + 7) / 8);                              \
            TYPE *out = (TYPE *)w->out + row * w->columns;                                                \
            int64_t column = 0;                                                                           \
            (void)end;                                                                                    \
            WHOLE_GROUPS                                                                                  \
            for (; column < w->columns; column++)                                                         \
                out[column] = bits[column / 8] >> column % 8 & 1 ? *values++ : 0;                         \
        }                                                                                                 \
    }                                                                                                     \
    void NAME(RUNTIME, const void *values, const uint8_t *bitmask, const int64_t *starts, int64_t rows,   \
              int64_t columns, void *out) {                                                               \
        unpacking work = {values, bitmask, starts, rows, columns, out};                                   \
        share(start, number, count, threads, NAME##_rows, &work, rows);                                   \
    }

#define GROUPS(EXPAND, PUT)                                        \
    for (; column + LANES <= w->columns; column += LANES) {        \
        unsigned kept = group_bits(bits, column);                  \
        ASK_AHEAD(values);                                         \
        PUT(out + column, EXPAND(values, kept, end));              \
        values += __builtin_popcount(kept);                        \
    }

UNPACK(unpack_16, uint16_t, GROUPS(expand_16, STORE_LOW_HALVES))
UNPACK(unpack_32, uint32_t, GROUPS(expand_32, STORE))
UNPACK(unpack_64, uint64_t, ) /* float64 is for checks */

/* --- Y = X W^T: x float32 (tokens, columns), y float32 (tokens, rows) --- */

typedef struct {
    const void *values;
    const uint8_t *bitmask;
    const int64_t *starts;
    int64_t rows, columns, tokens;
    const float *x;
    float *y;
} product;

/* TOKENS is a constant where this is used, so that the sums stay in registers. Two sums for each of few tokens, since
   an addition takes longer than it takes to have the next group. */
#define PRODUCT_OF(DTYPE, TYPE, FLOATS, EXPAND, TOKENS)                                                       \
    static void bitmask_##DTYPE##_##TOKENS(const product *w, int64_t row, int64_t token) {                    \
        const TYPE *values = (const TYPE *)w->values + w->starts[row];                                        \
        const TYPE *end = (const TYPE *)w->values + w->starts[w->rows];                                       \
        const uint8_t *bits = w->bitmask + row * ((w->columns + 7) / 8);                                      \
        const float *x = w->x + token * w->columns;                                                           \
        int64_t column = 0;                                                                                   \
        floats even[TOKENS], odd[TOKENS];                                                                     \
        for (int t = 0; t < TOKENS; t++) even[t] = odd[t] = ZERO;                                             \
        for (; column + 2 * LANES <= w->columns; column += 2 * LANES) {                                       \
            unsigned kept = group_bits(bits, column), next = group_bits(bits, column + LANES);                \
            ASK_AHEAD(values);                                                                                \
            floats weights = FLOATS(EXPAND(values, kept, end));                                               \
            values += __builtin_popcount(kept);                                                               \
            for (int t = 0; t < TOKENS; t++)                                                                  \
                even[t] = MULTIPLY_ADD(weights, LOAD(x + t * w->columns + column), even[t]);                  \
            weights = FLOATS(EXPAND(values, next, end));                                                      \
            values += __builtin_popcount(next);                                                               \
            for (int t = 0; t < TOKENS; t++)                                                                  \
                odd[t] = MULTIPLY_ADD(weights, LOAD(x + t * w->columns + column + LANES), odd[t]);            \
        }                                                                                                     \
        for (; column < w->columns; column += LANES) {                                                        \
            int64_t left = w->columns - column < LANES ? w->columns - column : LANES;                         \
            unsigned kept = left < LANES ? last_bits(bits, column, w->columns) : group_bits(bits, column);    \
            floats weights = FLOATS(EXPAND(values, kept, end));                                               \
            values += __builtin_popcount(kept);                                                               \
            for (int t = 0; t < TOKENS; t++)                                                                  \
                even[t] = MULTIPLY_ADD(weights, LOAD_FIRST(x + t * w->columns + column, left), even[t]);      \
        }                                                                                                     \
        for (int t = 0; t < TOKENS; t++) w->y[(token + t) * w->rows + row] = SUM(ADD(even[t], odd[t]));       \
    }

#define PRODUCT(DTYPE, TYPE, FLOATS, EXPAND, LOAD_VALUES, ONE)                                                \
    PRODUCT_OF(DTYPE, TYPE, FLOATS, EXPAND, 1)                                                                \
    PRODUCT_OF(DTYPE, TYPE, FLOATS, EXPAND, 2)                                                                \
    PRODUCT_OF(DTYPE, TYPE, FLOATS, EXPAND, 4)                                                                \
    PRODUCT_OF(DTYPE, TYPE, FLOATS, EXPAND, 8)                                                                \
    static void bitmask_##DTYPE##_rows(const void *work, int64_t first, int64_t last) {                       \
        const product *w = work;                                                                              \
        for (int64_t row = first; row < last; row++) {                                                        \
            int64_t token = 0;                                                                                \
            for (; token + 8 <= w->tokens; token += 8) bitmask_##DTYPE##_8(w, row, token);                    \
            for (; token + 4 <= w->tokens; token += 4) bitmask_##DTYPE##_4(w, row, token);                    \
            for (; token + 2 <= w->tokens; token += 2) bitmask_##DTYPE##_2(w, row, token);                    \
            for (; token < w->tokens; token++) bitmask_##DTYPE##_1(w, row, token);                            \
        }                                                                                                     \
    }                                                                                                         \
    void bitmask_##DTYPE(RUNTIME, const void *values, const uint8_t *bitmask, const int64_t *starts,          \
                         int64_t rows, int64_t columns, int64_t tokens, const float *x, float *y) {           \
        product work = {values, bitmask, starts, rows, columns, tokens, x, y};                                \
        share(start, number, count, threads, bitmask_##DTYPE##_rows, &work, rows);                            \
    }

FOR_EACH_DTYPE(PRODUCT)

/* Weights packed as values and bitmask, on a CPU with AVX2 or AVX-512: unpacking, and Y = X W^T for few tokens.

   Bit b of byte j of a row says whether column 8 j + b is kept; the values lie row by row. A group of LANES columns
   takes its next popcount(bits) values and spreads them over the lanes whose bits are set ("expand"), so a weight is
   read as it lies in memory: n d + N / 8 bytes for n of N weights of d bytes, where a dense product reads N d.

   Threads are those of the OpenMP runtime that torch has loaded already, whose entry points are handed in: a second
   runtime would keep threads of its own spinning on the same cores, and no compiler needs to know OpenMP. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES 16
typedef __m512 floats;
typedef __m512i words;
#define ZERO _mm512_setzero_ps()
#define ADD(a, b) _mm512_add_ps(a, b)
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(a) _mm512_reduce_add_ps(a)
#define LOAD(p) _mm512_loadu_ps(p)
#define LOAD_FIRST(p, n) _mm512_maskz_loadu_ps((__mmask16)((1u << (n)) - 1), p)
#define STORE(p, a) _mm512_storeu_si512(p, a)
#define AS_FLOATS(a) _mm512_castsi512_ps(a)
#define HALF_TO_FLOATS(a) _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a))
#define SHIFT_16(a) _mm512_slli_epi32(a, 16)
#define STORE_LOW_HALVES(p, a) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtepi32_epi16(a))

static inline words expand_32(const uint32_t *values, unsigned bits, const uint32_t *end) {
    (void)end; /* a masked load touches nothing beyond the values it takes */
    return _mm512_maskz_expandloadu_epi32((__mmask16)bits, values);
}

static inline words expand_16(const uint16_t *values, unsigned bits, const uint16_t *end) {
    (void)end;
    __mmask16 first = (__mmask16)((1u << __builtin_popcount(bits)) - 1);
    words wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, values));
    return _mm512_maskz_expand_epi32((__mmask16)bits, wide);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
typedef __m256 floats;
typedef __m256i words;
#define ZERO _mm256_setzero_ps()
#define ADD(a, b) _mm256_add_ps(a, b)
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LOAD(p) _mm256_loadu_ps(p)
#define LOAD_FIRST(p, n) _mm256_maskload_ps(p, first_lanes(n))
#define STORE(p, a) _mm256_storeu_si256((__m256i *)(p), a)
#define AS_FLOATS(a) _mm256_castsi256_ps(a)
#define HALF_TO_FLOATS(a) _mm256_cvtph_ps(low_halves(a))
#define SHIFT_16(a) _mm256_slli_epi32(a, 16)
#define STORE_LOW_HALVES(p, a) _mm_storeu_si128((__m128i *)(p), low_halves(a))

static uint8_t ranks[256][8]; /* [bits][lane]: how many bits are set below this lane */

static void __attribute__((constructor)) fill_ranks(void) {
    for (int bits = 0; bits < 256; bits++)
        for (int lane = 0; lane < 8; lane++)
            ranks[bits][lane] = (uint8_t)__builtin_popcount(bits & ((1 << lane) - 1));
}

static inline __m256i first_lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline __m128i low_halves(__m256i a) {
    __m256i packed = _mm256_packus_epi32(a, a); /* all are below 2^16 */
    return _mm_unpacklo_epi64(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
}

static inline float SUM(__m256 a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

static inline words spread(__m256i values, unsigned bits) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)ranks[bits]));
    __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane_bit), lane_bit);
    return _mm256_and_si256(_mm256_permutevar8x32_epi32(values, places), kept);
}

static inline words expand_32(const uint32_t *values, unsigned bits, const uint32_t *end) {
    if (end - values >= 8) return spread(_mm256_loadu_si256((const __m256i *)values), bits);
    uint32_t last[8] = {0}; /* a whole load would read beyond the last value */
    memcpy(last, values, sizeof *values * (size_t)(end - values));
    return spread(_mm256_loadu_si256((const __m256i *)last), bits);
}

static inline words expand_16(const uint16_t *values, unsigned bits, const uint16_t *end) {
    if (end - values >= 8) return spread(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)values)), bits);
    uint16_t last[8] = {0};
    memcpy(last, values, sizeof *values * (size_t)(end - values));
    return spread(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)last)), bits);
}

#else
#error "AVX2 with FMA and F16C, or AVX-512 F, BW and VL are needed"
#endif

/* --- threads --- */

typedef void (*task)(const void *work, int64_t first, int64_t last); /* some rows */

typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
typedef int (*asked)(void);                                                /* omp_get_thread_num, omp_get_num_threads */

typedef struct {
    asked number, count;
    task run;
    const void *work;
    int64_t rows;
} shared_task;

static void one_share(void *data) {
    const shared_task *all = data;
    int64_t number = all->number(), count = all->count();
    all->run(all->work, all->rows * number / count, all->rows * (number + 1) / count);
}

static void share(parallel start, asked number, asked count, int threads, task run, const void *work, int64_t rows) {
    shared_task all = {number, count, run, work, rows};
    if (threads > 1) start(one_share, &all, (unsigned)threads, 0);
    else run(work, 0, rows);
}

/* What every kernel is called with first. */
#define RUNTIME parallel start, asked number, asked count, int threads

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

/* Values come from memory faster when they are asked for this many bytes before their turn: the processor's own
   prefetching, made for steady strides, loses a stream whose steps differ (1.6 of the time without, at 75% zeros). */
#define AHEAD 4096
#define ASK_AHEAD(values) _mm_prefetch((const char *)(values) + AHEAD, _MM_HINT_T0)

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
#define PRODUCT_OF(NAME, TYPE, WEIGHTS, TOKENS)                                                               \
    static void NAME##_##TOKENS(const product *w, int64_t row, int64_t token) {                               \
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
            floats weights = WEIGHTS(values, kept, end);                                                      \
            values += __builtin_popcount(kept);                                                               \
            for (int t = 0; t < TOKENS; t++)                                                                  \
                even[t] = MULTIPLY_ADD(weights, LOAD(x + t * w->columns + column), even[t]);                  \
            weights = WEIGHTS(values, next, end);                                                             \
            values += __builtin_popcount(next);                                                               \
            for (int t = 0; t < TOKENS; t++)                                                                  \
                odd[t] = MULTIPLY_ADD(weights, LOAD(x + t * w->columns + column + LANES), odd[t]);            \
        }                                                                                                     \
        for (; column < w->columns; column += LANES) {                                                        \
            int64_t left = w->columns - column < LANES ? w->columns - column : LANES;                         \
            unsigned kept = left < LANES ? last_bits(bits, column, w->columns) : group_bits(bits, column);    \
            floats weights = WEIGHTS(values, kept, end);                                                      \
            values += __builtin_popcount(kept);                                                               \
            for (int t = 0; t < TOKENS; t++)                                                                  \
                even[t] = MULTIPLY_ADD(weights, LOAD_FIRST(x + t * w->columns + column, left), even[t]);      \
        }                                                                                                     \
        for (int t = 0; t < TOKENS; t++) w->y[(token + t) * w->rows + row] = SUM(ADD(even[t], odd[t]));       \
    }

#define PRODUCT(NAME, TYPE, WEIGHTS)                                                                          \
    PRODUCT_OF(NAME, TYPE, WEIGHTS, 1)                                                                        \
    PRODUCT_OF(NAME, TYPE, WEIGHTS, 2)                                                                        \
    PRODUCT_OF(NAME, TYPE, WEIGHTS, 4)                                                                        \
    PRODUCT_OF(NAME, TYPE, WEIGHTS, 8)                                                                        \
    static void NAME##_rows(const void *work, int64_t first, int64_t last) {                                        \
        const product *w = work;                                                                              \
        for (int64_t row = first; row < last; row++) {                                                        \
            int64_t token = 0;                                                                                \
            for (; token + 8 <= w->tokens; token += 8) NAME##_8(w, row, token);                               \
            for (; token + 4 <= w->tokens; token += 4) NAME##_4(w, row, token);                               \
            for (; token + 2 <= w->tokens; token += 2) NAME##_2(w, row, token);                               \
            for (; token < w->tokens; token++) NAME##_1(w, row, token);                                       \
        }                                                                                                     \
    }                                                                                                         \
    void NAME(RUNTIME, const void *values, const uint8_t *bitmask, const int64_t *starts, int64_t rows,       \
              int64_t columns, int64_t tokens, const float *x, float *y) {                                    \
        product work = {values, bitmask, starts, rows, columns, tokens, x, y};                                \
        share(start, number, count, threads, NAME##_rows, &work, rows);                                       \
    }

#define FLOAT32(values, bits, end) AS_FLOATS(expand_32(values, bits, end))
#define BFLOAT16(values, bits, end) AS_FLOATS(SHIFT_16(expand_16(values, bits, end)))
#define FLOAT16(values, bits, end) HALF_TO_FLOATS(expand_16(values, bits, end))

PRODUCT(product_float32, uint32_t, FLOAT32)
PRODUCT(product_bfloat16, uint16_t, BFLOAT16)
PRODUCT(product_float16, uint16_t, FLOAT16)

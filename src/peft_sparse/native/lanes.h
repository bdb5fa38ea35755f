/* What the kernels share: LANES float32 numbers or words at a time, by AVX-512 or AVX2, and threads.

   `expand_32` and `expand_16` take the next popcount(bits) values and spread them over the lanes whose bits are set, with
   zeros in the others; with the lowest n bits set they load n values. Nothing is read beyond `end`. */

#ifndef PEFT_SPARSE_LANES_H
#define PEFT_SPARSE_LANES_H

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
#define STORE_FLOATS(p, a) _mm512_storeu_ps(p, a)
#define AS_FLOATS(a) _mm512_castsi512_ps(a)
#define BROADCAST(value) _mm512_set1_ps(value)
#define GATHER(x, columns) _mm512_i32gather_ps(columns, x, 4)
#define GATHER_FIRST(x, columns, n) _mm512_mask_i32gather_ps(ZERO, (__mmask16)((1u << (n)) - 1), columns, x, 4)
#define LOAD_32(p) _mm512_loadu_si512(p)
#define LOAD_16(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
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
#define STORE_FLOATS(p, a) _mm256_storeu_ps(p, a)
#define AS_FLOATS(a) _mm256_castsi256_ps(a)
#define BROADCAST(value) _mm256_set1_ps(value)
#define GATHER(x, columns) _mm256_i32gather_ps(x, columns, 4)
#define GATHER_FIRST(x, columns, n) _mm256_mask_i32gather_ps(ZERO, x, columns, _mm256_castsi256_ps(first_lanes(n)), 4)
#define LOAD_32(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
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
    if (end - values >= 8) return spread(LOAD_32(values), bits);
    uint32_t last[8] = {0}; /* a whole load would read beyond the last value */
    memcpy(last, values, sizeof *values * (size_t)(end - values));
    return spread(LOAD_32(last), bits);
}

static inline words expand_16(const uint16_t *values, unsigned bits, const uint16_t *end) {
    if (end - values >= 8) return spread(LOAD_16(values), bits);
    uint16_t last[8] = {0};
    memcpy(last, values, sizeof *values * (size_t)(end - values));
    return spread(LOAD_16(last), bits);
}

#else
#error "AVX2 with FMA and F16C, or AVX-512 F, BW and VL are needed"
#endif

/* A weight's dtype: its C type; its entries as floats, from a pointer by `expand`; one of them. */
static inline float bfloat16_to_float(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

#define FOR_EACH_DTYPE(KERNEL)                                                                     \
    KERNEL(float32, uint32_t, AS_FLOATS, expand_32, LOAD_32, float_of_bits)                        \
    KERNEL(bfloat16, uint16_t, BFLOAT16_TO_FLOATS, expand_16, LOAD_16, bfloat16_to_float)          \
    KERNEL(float16, uint16_t, HALF_TO_FLOATS, expand_16, LOAD_16, _cvtsh_ss)
#define BFLOAT16_TO_FLOATS(a) AS_FLOATS(SHIFT_16(a))

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* --- threads: those of the OpenMP runtime that torch has loaded already, whose entry points are handed in. A second
   runtime would keep threads of its own spinning on the same cores; and no compiler needs to know OpenMP. --- */

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

/* Values come from memory faster when they are asked for this many bytes before their turn: the processor's own
   prefetching, made for steady strides, loses a stream whose steps differ (1.6 of the time without, at 75% zeros). */
#define AHEAD 4096
#define ASK_AHEAD(values) _mm_prefetch((const char *)(values) + AHEAD, _MM_HINT_T0)

#endif

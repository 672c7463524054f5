/* What a kernel that was translated to C (ptx_to_c.py) and the machine that runs it (pretended_gpu.c) share. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Why a thread stopped: it has ended, waits for its block, or for the other lanes of its warp, with a number for one. */
enum { READY, ENDED, BLOCK, WARP, EXCHANGE };

typedef struct {
    uint32_t tid[3], ctaid[3], ntid[3], nctaid[3];
    const uint64_t *parameters; /* each in eight bytes of its own */
    char *shared;
    uint32_t shared_bytes;
    int at;      /* the place in the kernel where it goes on */
    int stopped; /* one of the above */
    uint32_t given, taken, apart; /* the lane whose number is l xor apart gets what l has given */
    uint32_t members, bounds;     /* which lanes take part, and the instruction's limits of a group */
    const char *kernel;
} Thread;

/* Runs until the thread stops, and says why. `registers` are kept between runs. */
typedef int Program(Thread *thread, void *registers);

/* Where a kernel's address really is; trouble and a place to waste where it is not a thread's to use. */
char *global_at(Thread *thread, uint64_t address, unsigned bytes);
char *shared_at(Thread *thread, uint64_t address, unsigned bytes);

static inline float f32_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t b32_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* PTX gives the other one where one of both is not a number, and so does C. */
static inline float max_f32(float a, float b) { return fmaxf(a, b); }
static inline float min_f32(float a, float b) { return fminf(a, b); }
static inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

/* a · b + c, rounded towards minus infinity. The product is exact in double, and
   so are most sums. */
static inline float fma_down(float a, float b, float c)
{
    double exact = fma(a, b, c);
    float x = (float)exact;
    return x > exact ? nextafterf(x, -INFINITY) : x;
}

/* a + b, rounded towards zero. */
static inline float add_to_zero(float a, float b)
{
    double exact = (double)a + b;
    float x = (float)exact;
    return fabs(x) > fabs(exact) ? nextafterf(x, 0) : x;
}

/* What is too small for a normal number counts as 0, before and after. */
static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
static inline float exp2_approximate(float x) { return flushed(exp2f(flushed(x))); }

/* Shifts by the width or more leave nothing, or the sign. */
static inline uint64_t left_64(uint64_t x, uint32_t by) { return by > 63 ? 0 : x << by; }
static inline uint64_t right_u64(uint64_t x, uint32_t by) { return by > 63 ? 0 : x >> by; }
static inline int64_t right_s64(int64_t x, uint32_t by) { return x >> (by > 63 ? 63 : by); }
static inline uint32_t left_32(uint32_t x, uint32_t by) { return by > 31 ? 0 : x << by; }
static inline uint32_t right_u32(uint32_t x, uint32_t by) { return by > 31 ? 0 : x >> by; }
static inline int32_t right_s32(int32_t x, uint32_t by) { return x >> (by > 31 ? 31 : by); }

/* The lowest bits of a, so many, in the place of b's from bit `at` on. */
static inline uint64_t insert_64(uint64_t a, uint64_t b, uint32_t at, uint32_t bits)
{
    uint64_t mask = at > 63 ? 0 : (bits > 63 ? ~0ull : (1ull << bits) - 1) << at;
    return (b & ~mask) | ((at > 63 ? 0 : a << at) & mask);
}
static inline uint32_t insert_32(uint32_t a, uint32_t b, uint32_t at, uint32_t bits)
{
    return (uint32_t)insert_64(a, b, at, bits > 32 ? 32 : bits);
}

// What kernels take of CUDA, on a CPU: a warp is 32 coroutines, each with a stack of its own,
// that run one after the other from one collective operation to the next. Warps of a block run
// one after the other from barrier to barrier, by turns in one order and the other, so that a
// barrier that is missing is likely to be missed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define __global__
#define __device__
#define __forceinline__ inline

struct Dimensions {
    unsigned int x;
};

static Dimensions blockIdx, gridDim, threadIdx;
static Dimensions blockDim;

namespace warp {

const unsigned int LANES_OF_WARP = 32;
const unsigned int THREADS_OF_BLOCK = 1024;
const size_t STACK_BYTES = 256 << 10;

enum Operation { NONE, BALLOT, SHUFFLE, BARRIER, BLOCK_BARRIER, END };

// What a lane waits for, where, and with what.
struct Lane {
    void* resume[5];
    Operation operation;
    unsigned int value;
    unsigned int source;
    unsigned int result;
};

static Lane lanes[THREADS_OF_BLOCK];
static char* stacks[THREADS_OF_BLOCK];
static void* scheduler[5];
static void (*body)();

// The compiler's own jumps, in functions of their own as it demands: those of the C library are
// known to AddressSanitizer, which takes long over each.
#define SWITCH __attribute__((noinline, no_sanitize("address")))

SWITCH static void to_scheduler() { __builtin_longjmp(scheduler, 1); }
SWITCH static void to_lane(unsigned int at) { __builtin_longjmp(lanes[at].resume, 1); }

SWITCH static void run_lane() {
    body();
    lanes[threadIdx.x].operation = END;
    to_scheduler();
}

SWITCH static void wait(Lane& lane) {
    if (__builtin_setjmp(lane.resume) == 0) to_scheduler();
}

// Waits until all lanes came to the same operation.
static unsigned int meet(Operation operation, unsigned int value, unsigned int source) {
    Lane& lane = lanes[threadIdx.x];
    lane.operation = operation;
    lane.value = value;
    lane.source = source;
    wait(lane);
    return lane.result;
}

SWITCH static void start(unsigned int at) {
    if (!stacks[at]) {
        stacks[at] = (char*)mmap(0, STACK_BYTES, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stacks[at] == MAP_FAILED) abort();
    }
    char* top = stacks[at] + STACK_BYTES;
#if defined(__x86_64__)
    asm volatile("mov %0, %%rsp\n\tcall *%1" : : "r"(top), "r"(run_lane) : "memory");
#elif defined(__aarch64__)
    asm volatile("mov sp, %0\n\tblr %1" : : "r"(top), "r"(run_lane) : "memory");
#else
#error "no way onto another stack"
#endif
    __builtin_unreachable();
}

SWITCH static void run_until_it_waits(unsigned int at, bool started) {
    threadIdx.x = at;
    if (__builtin_setjmp(scheduler) == 0) {
        if (started) to_lane(at);
        start(at);
    }
}

// Runs the lanes of a warp until all wait for the block, or have ended; gives which.
static Operation run_warp(unsigned int first, bool started) {
    for (;; started = true) {
        for (unsigned int at = 0; at < LANES_OF_WARP; at++) run_until_it_waits(first + at, started);
        Lane* warp = lanes + first;
        Operation operation = warp[0].operation;
        unsigned int votes = 0;
        for (unsigned int at = 0; at < LANES_OF_WARP; at++) {
            if (warp[at].operation != operation) {
                fprintf(stderr, "lanes 0 and %u wait for different operations\n", at);
                abort();
            }
            votes |= (unsigned int)(warp[at].value != 0) << at;
        }
        if (operation == END || operation == BLOCK_BARRIER) return operation;
        for (unsigned int at = 0; at < LANES_OF_WARP; at++) {
            warp[at].result =
                operation == BALLOT ? votes : warp[warp[at].source % LANES_OF_WARP].value;
        }
    }
}

// Runs a kernel with so many threads a block: whole warps.
static void launch(void (*kernel)(), unsigned int blocks, unsigned int threads) {
    if (threads == 0 || threads > THREADS_OF_BLOCK || threads % LANES_OF_WARP != 0) abort();
    body = kernel;
    gridDim.x = blocks;
    blockDim.x = threads;
    unsigned int warps = threads / LANES_OF_WARP;
    unsigned int turn = 0;
    for (unsigned int block = 0; block < blocks; block++) {
        blockIdx.x = block;
        for (bool started = false;; started = true) {
            Operation operation = NONE;
            turn++;
            for (unsigned int at = 0; at < warps; at++) {
                unsigned int warp = turn % 2 ? at : warps - 1 - at;
                Operation of_warp = run_warp(warp * LANES_OF_WARP, started);
                if (at > 0 && of_warp != operation) {
                    fprintf(stderr, "some warps wait at a barrier, and others ended\n");
                    abort();
                }
                operation = of_warp;
            }
            if (operation == END) break;
        }
    }
}

}  // namespace warp

static inline unsigned int __ballot_sync(unsigned int, bool vote) {
    return warp::meet(warp::BALLOT, vote, 0);
}
static inline unsigned int __shfl_sync(unsigned int, unsigned int value, unsigned int source) {
    return warp::meet(warp::SHUFFLE, value, source);
}
static inline float __shfl_xor_sync(unsigned int, float value, unsigned int mask) {
    unsigned int bits;
    memcpy(&bits, &value, 4);
    bits = warp::meet(warp::SHUFFLE, bits, threadIdx.x ^ mask);
    memcpy(&value, &bits, 4);
    return value;
}
static inline float __shfl_sync(unsigned int, float value, unsigned int source) {
    unsigned int bits;
    memcpy(&bits, &value, 4);
    bits = warp::meet(warp::SHUFFLE, bits, source);
    memcpy(&value, &bits, 4);
    return value;
}
static inline void __syncwarp() { warp::meet(warp::BARRIER, 0, 0); }
static inline void __syncthreads() { warp::meet(warp::BLOCK_BARRIER, 0, 0); }
static inline int __popc(unsigned int bits) { return __builtin_popcount(bits); }
template <typename T> static inline T __ldg(const T* at) { return *at; }
static inline float __uint_as_float(unsigned int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned int __float_as_uint(float value) {
    unsigned int bits;
    memcpy(&bits, &value, 4);
    return bits;
}
// Compiled without contraction, so that each rounds.
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }

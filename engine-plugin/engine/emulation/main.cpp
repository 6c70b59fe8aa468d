// The engine's kernels on the CPU: memory, products and launches of a device, as a test asks
// for them. Every allocation is one of its own, so that AddressSanitizer sees what reads or
// writes beyond it.
//
//   A bytes                      allocates; answers the address
//   F address                    frees
//   W address bytes data         writes
//   R address bytes              answers what is there
//   Z address bytes              fills with zeros
//   L name(24) blocks threads shared bytes arguments      launches
//   M weight input output rows inputs outputs type accumulate     multiplies
//
// All numbers are u64.

#include <vector>

#include "../../../codec/cuda/emulation/warp.h"

static inline unsigned int min(unsigned int a, unsigned int b) { return a < b ? a : b; }

static float* dynamic_shared;
#define DYNAMIC_SHARED(name) float* name = dynamic_shared

#include "../../../codec/cuda/src/numbers.cu"
#include "../src/device/rows.cu"
#include "../src/device/attention.cu"

static void read_all(void* into, size_t size) {
    if (size > 0 && fread(into, 1, size, stdin) != size) exit(0);
}

static u64 read_number() {
    u64 number;
    read_all(&number, sizeof number);
    return number;
}

alignas(16) static char arguments[256];

template <typename Arguments, void (*kernel)(const Arguments)> static void run() {
    kernel(*(const Arguments*)arguments);
}

struct Kernel {
    const char* name;
    size_t bytes;
    void (*run)();
};

#define ENTRY(name, type) {#name, sizeof(type), run<type, name>}
#define ENTRIES(name) \
    ENTRY(attend_rows_##name##_64, Attend), ENTRY(attend_rows_##name##_128, Attend), \
        ENTRY(attend_rows_##name##_256, Attend), ENTRY(attend_rows_##name##_512, Attend), \
        ENTRY(attend_tiles_##name, Attend)

static const Kernel kernels[] = {
    ENTRY(embed, Embed), ENTRY(angles, Angles), ENTRY(rms_norm, Norm), ENTRY(heads, Heads),
    ENTRY(append, Append), ENTRY(activate, Activate), ENTRY(add_bias, AddBias),
    ENTRY(gather, Gather), ENTRY(argmax, Argmax), ENTRY(move, Move), ENTRY(merge, Merge),
    ENTRIES(f32), ENTRIES(f16), ENTRIES(bf16),
};

static void launch() {
    char name[24];
    read_all(name, sizeof name);
    u64 blocks = read_number(), threads = read_number(), shared = read_number();
    u64 bytes = read_number();
    if (bytes > sizeof arguments) abort();
    read_all(arguments, bytes);
    for (const Kernel& kernel : kernels) {
        if (strncmp(kernel.name, name, sizeof name) != 0) continue;
        if (kernel.bytes != bytes) {
            fprintf(stderr, "%s takes %zu bytes of arguments\n", name, kernel.bytes);
            abort();
        }
        // What was not written is no number. Allocations begin at a multiple of 16.
        dynamic_shared = (float*)malloc(shared);
        memset(dynamic_shared, 0xff, shared);
        warp::launch(kernel.run, (unsigned int)blocks, (unsigned int)threads);
        free(dynamic_shared);
        return;
    }
    fprintf(stderr, "there is no kernel %s\n", name);
    abort();
}

// Rows of `inputs` times rows of weights, which are as long. Loads and stores are checked once a
// row, and not in the loop.
__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) static float dot(
    const float* a, const float* b, size_t count
) {
    float lanes[16] = {};
    size_t at = 0;
    for (; at + 16 <= count; at += 16) {
        for (size_t lane = 0; lane < 16; lane++) lanes[lane] += a[at + lane] * b[at + lane];
    }
    float sum = 0;
    for (; at < count; at++) sum += a[at] * b[at];
    for (float lane : lanes) sum += lane;
    return sum;
}

static std::vector<float> widened(const u8* from, u32 type, size_t count) {
    std::vector<float> values(count);
    for (size_t at = 0; at < count; at++) values[at] = load(from + at * size_of(type), type);
    return values;
}

static void multiply() {
    const u8* weight = (const u8*)read_number();
    const u8* input = (const u8*)read_number();
    float* output = (float*)read_number();
    u64 rows = read_number(), inputs = read_number(), outputs = read_number();
    u32 type = (u32)read_number();
    bool accumulate = read_number() != 0;
    std::vector<float> weights = widened(weight, type, outputs * inputs);
    std::vector<float> values = widened(input, type, rows * inputs);
    for (u64 row = 0; row < rows; row++) {
        for (u64 at = 0; at < outputs; at++) {
            float sum = dot(&values[row * inputs], &weights[at * inputs], inputs);
            float* to = output + row * outputs + at;
            *to = accumulate ? *to + sum : sum;
        }
    }
}

int main() {
    for (;;) {
        char command;
        read_all(&command, 1);
        if (command == 'A') {
            u64 bytes = read_number();
            void* memory = malloc(bytes);
            // No number, whichever type it is read as.
            memset(memory, 0xff, bytes);
            u64 address = (u64)memory;
            fwrite(&address, sizeof address, 1, stdout);
            fflush(stdout);
        } else if (command == 'F') {
            free((void*)read_number());
        } else if (command == 'W') {
            void* to = (void*)read_number();
            u64 bytes = read_number();
            read_all(to, bytes);
        } else if (command == 'R') {
            const void* from = (const void*)read_number();
            u64 bytes = read_number();
            fwrite(from, 1, bytes, stdout);
            fflush(stdout);
        } else if (command == 'Z') {
            void* to = (void*)read_number();
            memset(to, 0, read_number());
        } else if (command == 'L') {
            launch();
        } else if (command == 'M') {
            multiply();
        } else {
            abort();
        }
    }
}

// Runs decode.cu on what a test sends, and sends back what it wrote.
//
//   in  := cell count (u32) ‖ numbers per warp (u32) ‖ warps (u32) ‖ 14 sections ‖ out
//   out := bytes of the destination ‖ results
//
// A section is a length (u64) and its bytes. The destination is one buffer, and the section of
// destinations has where each begins in it. Every section has an allocation of its own, so
// that AddressSanitizer sees a read beyond it.

#include "warp.h"
#include "../src/numbers.cu"
#include "../src/decode.cu"

static void read_all(void* into, size_t size) {
    if (size > 0 && fread(into, 1, size, stdin) != size) exit(3);
}

template <typename T> static T* read_section(size_t* bytes = 0) {
    uint64_t size;
    read_all(&size, sizeof size);
    T* section = (T*)malloc(size);
    read_all(section, size);
    if (bytes) *bytes = size;
    return section;
}

static Arguments arguments;

static void kernel() { decode_cells(arguments); }

int main() {
    uint32_t counts[3];
    while (fread(counts, sizeof counts, 1, stdin) == 1) {
        arguments.cell_count = counts[0];
        arguments.numbers_per_warp = counts[1];
        arguments.cells = read_section<Cell>();
        arguments.groups = read_section<Group>();
        arguments.words = read_section<u16>();
        arguments.states = read_section<u32>();
        arguments.classes = read_section<u8>();
        arguments.offsets = read_section<float>();
        arguments.outlier_positions = read_section<u16>();
        arguments.outlier_values = read_section<u32>();
        arguments.angles = read_section<float>();
        arguments.exact = read_section<u8>();
        arguments.pages = read_section<u32>();
        arguments.base = read_section<u32>();
        arguments.thirds = read_section<u32>();
        size_t destinations_bytes, bytes;
        u64* destinations = read_section<u64>(&destinations_bytes);
        u8* destination = read_section<u8>(&bytes);
        for (size_t at = 0; at < destinations_bytes / sizeof(u64); at++) {
            destinations[at] += (u64)destination;
        }
        arguments.destinations = destinations;
        size_t numbers = (size_t)counts[1] * counts[2] * sizeof(short);
        arguments.numbers = (short*)malloc(numbers);
        // What is read before it was written is no number that a stream has.
        memset(arguments.numbers, 0x7f, numbers);
        arguments.results = (u32*)calloc(counts[0], sizeof(u32));
        warp::launch(kernel, counts[2], 32);
        fwrite(destination, 1, bytes, stdout);
        fwrite(arguments.results, sizeof(u32), counts[0], stdout);
        fflush(stdout);
        free((void*)arguments.cells), free((void*)arguments.groups);
        free((void*)arguments.words), free((void*)arguments.states);
        free((void*)arguments.classes), free((void*)arguments.offsets);
        free((void*)arguments.outlier_positions), free((void*)arguments.outlier_values);
        free((void*)arguments.angles), free((void*)arguments.exact);
        free((void*)arguments.pages), free((void*)arguments.base);
        free((void*)arguments.thirds), free(destinations), free(destination);
        free(arguments.numbers), free(arguments.results);
    }
}

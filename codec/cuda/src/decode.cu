// Decodes cells of the codec, each by one warp, and writes their values where they belong.
//
// A lane of the warp is a lane of the stream. The lanes share one sequence of words: those whose
// states fall below 2^16 after a symbol take the next words in the order of lanes, which each
// finds by counting the votes of the lanes before it.
//
// Sizes were checked by the host. Words are not what was checked: how many a level takes depends
// on the words themselves. So no read goes beyond the words of a level, and each cell says
// whether it ended as it should. Values are rounded as on the CPU, after each operation.
//
// Follows numbers.cu. Compiled by NVRTC, and by a C++ compiler against emulation/warp.h, which
// has no GPU.

#define LEVELS 3u
#define CLASSES 41u
#define DISTANCES 3u
#define PRECISION 11u
#define TOTAL (1u << PRECISION)
#define HALF (TOTAL / 2u)
#define LAST_STATE (1u << 16)

#define PAIRS_NONE 0u
#define PAIRS_HALVES 1u
#define PAIRS_NEIGHBOURS 2u

// What the host reads of a cell.
#define RESULT_DECODED 1u
#define RESULT_DAMAGED 2u

// Fields and their order are those of `CellRecord` in batch.rs.
struct Cell {
    u32 group;
    u32 first_token;
    u32 tokens;
    // In units of a word: where each level begins, and how many words it has.
    u32 words[LEVELS];
    u32 word_counts[LEVELS];
    u32 outliers;
    u32 outlier_count;
};

// `GroupRecord` in batch.rs. Numbers of 64 bits are in halves, the lower first.
struct Group {
    u32 channels;
    u32 blocks;
    u32 heads;
    u32 dim;
    u32 levels;
    float step;
    u32 type;
    u32 exact;
    u32 exact_tokens;
    u32 pairing;
    u32 pairs;
    u32 cosines;
    u32 sines;
    float factor;
    u32 pages;
    u32 page_tokens;
    u32 destination;
    u32 start[2];
    u32 page_stride[2];
    u32 token_stride[2];
    u32 head_stride[2];
};

// `Arguments` in decoder.rs.
struct Arguments {
    const Cell* cells;
    const Group* groups;
    const u16* words;
    // By cell and lane.
    const u32* states;
    const u8* classes;
    const float* offsets;
    const u16* outlier_positions;
    const u32* outlier_values;
    const float* angles;
    const u8* exact;
    const u32* pages;
    // Addresses.
    const u64* destinations;
    const u32* base;
    const u32* thirds;
    // `numbers_per_warp` for each warp.
    short* numbers;
    // By cell.
    u32* results;
    u32 cell_count;
    u32 numbers_per_warp;
};

static_assert(sizeof(Cell) == 11 * 4, "CellRecord::BYTES");
static_assert(sizeof(Group) == 25 * 4, "GroupRecord::BYTES");
static_assert(sizeof(Arguments) == 17 * 8, "as the host has them");

// The words of a level, of which 64 are in registers: a lane holds one of the first 32 and one
// of the others.
struct Words {
    const u16* words;
    u32 end;
    u32 next;
    u32 window;
    u32 near;
    u32 far;

    __device__ __forceinline__ u32 load(u32 at) const { return at < end ? words[at] : 0u; }

    __device__ __forceinline__ void begin(const u16* from, u32 count, u32 lane) {
        words = from;
        end = count;
        next = 0;
        window = 0;
        near = load(lane);
        far = load(LANES + lane);
    }

    // The state after a symbol, with a word more where it is small.
    __device__ __forceinline__ u32 refill(u32 state, u32 lane) {
        bool wants = state < LAST_STATE;
        u32 votes = __ballot_sync(ALL_LANES, wants);
        u32 at = next - window + __popc(votes & ((1u << lane) - 1u));
        u32 word_near = __shfl_sync(ALL_LANES, near, at & (LANES - 1u));
        u32 word_far = __shfl_sync(ALL_LANES, far, at & (LANES - 1u));
        if (wants) {
            state = state << 16 | (at < LANES ? word_near : word_far);
        }
        next += __popc(votes);
        if (next - window >= LANES) {
            window += LANES;
            near = far;
            far = load(window + LANES + lane);
        }
        return state;
    }
};

__device__ __forceinline__ u64 wide(const u32 halves[2]) {
    return (u64)halves[1] << 32 | halves[0];
}

// Base numbers of all rows; gives the state after them.
__device__ __forceinline__ u32 decode_base(
    const Arguments& arguments, const Group& group, u32 tokens, short* numbers, Words& words,
    u32 state, u32 lane
) {
    for (u32 block = 0; block < group.blocks; block++) {
        u32 channel_class = arguments.classes[group.channels + block * LANES + lane];
        const u32* table = arguments.base + channel_class * HALF;
        for (u32 token = 0; token < tokens; token++) {
            u32 entry = __ldg(table + (state & (HALF - 1u)));
            int number = (int)(entry & 0xffu) - 64;
            u32 frequency = (entry >> 8 & (TOTAL - 1u)) + 1u;
            u32 place = entry >> 19;
            if (state & HALF) {
                // Both zeros are one symbol, of which this is the second half.
                place += number == 0 ? frequency / 2u : 0u;
                number = -number;
            }
            state = words.refill(frequency * (state >> PRECISION) + place, lane);
            numbers[(block * tokens + token) * LANES + lane] = (short)number;
        }
    }
    return state;
}

// Takes the numbers of all rows to the next level; gives the state after them.
__device__ __forceinline__ u32 decode_thirds(
    const Arguments& arguments, const Group& group, u32 level, u32 tokens, short* numbers,
    Words& words, u32 state, u32 lane
) {
    // Levels begin at one here, and each has the tables of all classes.
    const u32* tables = arguments.thirds + (level - 1u) * CLASSES * DISTANCES;
    for (u32 block = 0; block < group.blocks; block++) {
        u32 channel_class = arguments.classes[group.channels + block * LANES + lane];
        u32 zero = tables[channel_class * DISTANCES];
        u32 one = tables[channel_class * DISTANCES + 1u];
        u32 more = tables[channel_class * DISTANCES + 2u];
        for (u32 token = 0; token < tokens; token++) {
            short* at = numbers + (block * tokens + token) * LANES + lane;
            int number = *at;
            u32 bounds = number == 0 ? zero : (number == 1 || number == -1) ? one : more;
            u32 middle = bounds & 0xffffu;
            u32 away = bounds >> 16;
            u32 slot = state & (TOTAL - 1u);
            int third = slot < middle ? -1 : slot < away ? 0 : 1;
            u32 first = slot < middle ? 0u : slot < away ? middle : away;
            u32 end = slot < middle ? middle : slot < away ? away : TOTAL;
            state = words.refill((end - first) * (state >> PRECISION) + (slot - first), lane);
            *at = (short)(3 * number + (number < 0 ? -third : third));
        }
    }
    return state;
}

// A row of a cell: the numbers of one token, and which outliers are in it.
struct Row {
    const Arguments& arguments;
    const Group& group;
    const short* numbers;
    u32 tokens;
    u32 token;
    u32 outliers;
    u32 outliers_end;

    __device__ __forceinline__ float value(u32 channel) const {
        u32 block = channel / LANES;
        short number = numbers[(block * tokens + token) * LANES + channel % LANES];
        u32 position = token * group.blocks * LANES + channel;
        for (u32 at = outliers; at < outliers_end; at++) {
            if (arguments.outlier_positions[at] == position) {
                return __uint_as_float(arguments.outlier_values[at]);
            }
        }
        float offset = arguments.offsets[group.channels + channel];
        return __fadd_rn(__fmul_rn((float)number, group.step), offset);
    }

    // A channel of a head, turned by the angles of a token of the chunk.
    __device__ __forceinline__ float turned(u32 head, u32 in_head, u32 chunk_token) const {
        float own = value(head * group.dim + in_head);
        if (in_head >= 2u * group.pairs) {
            return own;
        }
        bool halves = group.pairing == PAIRS_HALVES;
        bool first = halves ? in_head < group.pairs : in_head % 2u == 0u;
        u32 apart = halves ? group.pairs : 1u;
        u32 other_in_head = first ? in_head + apart : in_head - apart;
        u32 pair = halves ? (first ? in_head : other_in_head) : in_head / 2u;
        float other = value(head * group.dim + other_in_head);
        u32 angle = chunk_token * group.pairs + pair;
        float cosine = arguments.angles[group.cosines + angle];
        float sine = arguments.angles[group.sines + angle];
        float along = __fmul_rn(own, cosine);
        float across = __fmul_rn(other, sine);
        float sum = first ? __fsub_rn(along, across) : __fadd_rn(along, across);
        return __fmul_rn(sum, group.factor);
    }
};

__device__ __forceinline__ void write_cell(
    const Arguments& arguments, const Cell& cell, const Group& group, const short* numbers, u32 lane
) {
    u32 size = group.type == TYPE_F32 ? 4u : 2u;
    u32 width = group.blocks * LANES;
    u32 outlier = cell.outliers;
    u32 outliers_end = cell.outliers + cell.outlier_count;
    for (u32 token = 0; token < cell.tokens; token++) {
        u32 first = outlier;
        while (outlier < outliers_end
               && arguments.outlier_positions[outlier] < (token + 1u) * width) {
            outlier++;
        }
        Row row = {arguments, group, numbers, cell.tokens, token, first, outlier};
        u32 chunk_token = cell.first_token + token;
        u64 page = arguments.pages[group.pages + chunk_token / group.page_tokens];
        u64 in_page = chunk_token % group.page_tokens;
        u64 address = arguments.destinations[group.destination] + wide(group.start)
            + page * wide(group.page_stride) + in_page * wide(group.token_stride);
        for (u32 head = 0; head < group.heads; head++) {
            u8* out = (u8*)(address + head * wide(group.head_stride));
            if (chunk_token < group.exact_tokens) {
                u64 exact = ((u64)head * group.exact_tokens + chunk_token) * group.dim * size;
                for (u32 at = lane; at < group.dim * size; at += LANES) {
                    out[at] = arguments.exact[group.exact + exact + at];
                }
            } else {
                for (u32 at = lane; at < group.dim; at += LANES) {
                    float value = group.pairing == PAIRS_NONE ? row.value(head * group.dim + at)
                                                              : row.turned(head, at, chunk_token);
                    store(out + at * size, group.type, value);
                }
            }
        }
    }
}

extern "C" __global__ void decode_cells(const Arguments arguments) {
    u32 lane = threadIdx.x % LANES;
    u32 warps_of_block = blockDim.x / LANES;
    u32 warp = blockIdx.x * warps_of_block + threadIdx.x / LANES;
    u32 warps = gridDim.x * warps_of_block;
    short* numbers = arguments.numbers + (u64)warp * arguments.numbers_per_warp;
    for (u32 at = warp; at < arguments.cell_count; at += warps) {
        const Cell& cell = arguments.cells[at];
        const Group group = arguments.groups[cell.group];
        u32 state = arguments.states[at * LANES + lane];
        bool ended = true;
        for (u32 level = 0; level < group.levels; level++) {
            Words words;
            words.begin(arguments.words + cell.words[level], cell.word_counts[level], lane);
            if (level == 0) {
                state = decode_base(arguments, group, cell.tokens, numbers, words, state, lane);
            } else {
                state = decode_thirds(
                    arguments, group, level, cell.tokens, numbers, words, state, lane);
            }
            ended = ended && words.next == words.end;
        }
        if (group.levels == LEVELS) {
            ended = ended && state == LAST_STATE;
        }
        bool decoded = __ballot_sync(ALL_LANES, ended) == ALL_LANES;
        // Numbers are written by other lanes than those that read them.
        __syncwarp();
        write_cell(arguments, cell, group, numbers, lane);
        __syncwarp();
        if (lane == 0u) {
            arguments.results[at] = decoded ? RESULT_DECODED : RESULT_DAMAGED;
        }
    }
}

// Causal attention over paged K and V, with online softmax (Dao et al., arXiv 2205.14135).
//
// Two kernels for two shapes. `attend_rows` is for decoding: a block has one row of up to
// ROW_HEADS query heads, its warps take pages by turns, and several blocks may share a row's
// pages; `merge` puts together what they found. `attend_tiles` is for prompts: a block has up to
// TILE_ROWS rows of (token, query head), and goes over tiles of keys in shared memory, where
// rows share them. Keys that no row of a unit sees are not read.
//
// All f32. Follows rows.cu.

// What a block attends with. `Unit` in launch.rs.
struct Unit {
    // First row of queries, and how many: they are rows of one sequence, in order.
    u32 row;
    u32 tokens;
    // Query heads, all of the group of the KV head.
    u32 head;
    u32 heads;
    u32 kv_head;
    // Where the sequence's page table begins.
    u32 table;
    // Where the list of pages begins that are read; NONE for all.
    u32 list;
    // Which of the list: of all, the pages themselves.
    u32 first;
    u32 end;
};

struct Attend {
    // By row: query heads, after which there is more.
    const float* queries;
    // A layer.
    const u8* pool;
    // By row.
    const u32* positions;
    const u32* blocks;
    const u32* lists;
    const Unit* units;
    // Of `attend_rows`, by unit and head: the largest score, the sum of weights, and the
    // weighted sum of V.
    float* partial;
    // By row: of all heads, attended.
    u8* out;
    // From one row of queries to the next.
    u32 stride;
    u32 heads;
    u32 kv_heads;
    u32 dim;
    // Most recent positions that are seen, itself included; NONE for all.
    u32 window;
    u32 out_type;
    float scale;
    u32 unused;
};

static_assert(sizeof(Unit) == 9 * 4, "as the host has it");
static_assert(sizeof(Attend) == 12 * 8, "as the host has it");

#define ROW_HEADS 4u
#define ROW_WARPS 4u
#define TILE_ROWS 32u
#define TILE_KEYS 32u
#define TILE_DIM 128u
#define SMALLEST __uint_as_float(0xff800000u)

struct alignas(8) Pair {
    float x;
    float y;
};

// Channels 2 · pair and 2 · pair + 1 of a row.
template <u32 TYPE> __device__ __forceinline__ Pair load_pair(const u8* row, u32 pair) {
    if (TYPE == TYPE_F32) {
        return ((const Pair*)row)[pair];
    }
    u32 both = ((const u32*)row)[pair];
    u16 x = (u16)both, y = (u16)(both >> 16);
    if (TYPE == TYPE_F16) {
        return {from_f16(x), from_f16(y)};
    }
    return {from_bf16(x), from_bf16(y)};
}

__device__ __forceinline__ u32 page_of(const Attend& a, const Unit& unit, u32 slot) {
    return unit.list == NONE ? slot : a.lists[unit.list + slot];
}

// First position that the query at `position` sees.
__device__ __forceinline__ u32 first_seen(const Attend& a, u32 position) {
    return a.window == NONE || position + 1u < a.window ? 0u : position + 1u - a.window;
}

// Numbers of a partial result: see `Attend::partial`.
__device__ __forceinline__ u32 partial_width(const Attend& a) { return a.dim + 2u; }

// PAIRS: of channels that a lane sums, so that 64 · PAIRS are enough for all.
template <u32 TYPE, u32 PAIRS> __device__ __forceinline__ void attend_row(const Attend& a) {
    DYNAMIC_SHARED(shared);
    const Unit unit = a.units[blockIdx.x];
    u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    u32 pairs = a.dim / 2u;
    float* queries = shared;
    float* partials = shared + ROW_HEADS * a.dim;
    const float* from = a.queries + (u64)unit.row * a.stride + unit.head * a.dim;
    for (u32 at = threadIdx.x; at < ROW_HEADS * a.dim; at += blockDim.x) {
        queries[at] = at < unit.heads * a.dim ? from[at] * a.scale : 0.0f;
    }
    __syncthreads();

    u32 position = a.positions[unit.row];
    u32 seen = first_seen(a, position);
    u64 row_bytes = a.dim * size_of(TYPE);
    float largest[ROW_HEADS], sum[ROW_HEADS], values[ROW_HEADS][2 * PAIRS];
#pragma unroll
    for (u32 head = 0; head < ROW_HEADS; head++) {
        largest[head] = SMALLEST;
        sum[head] = 0.0f;
#pragma unroll
        for (u32 j = 0; j < 2u * PAIRS; j++) {
            values[head][j] = 0.0f;
        }
    }
    for (u32 slot = unit.first + warp; slot < unit.end; slot += ROW_WARPS) {
        u32 page = page_of(a, unit, slot);
        u32 before = page * BLOCK_TOKENS;
        // Tokens of the page that are seen.
        u32 low = seen > before ? min(seen - before, BLOCK_TOKENS) : 0u;
        u32 high = position + 1u > before ? min(position + 1u - before, BLOCK_TOKENS) : 0u;
        if (low >= high) {
            continue;
        }
        u32 block = a.blocks[unit.table + page];
        const u8* keys = a.pool + plane_at(block, 0, a.kv_heads, unit.kv_head, a.dim, TYPE);
        // Lanes of the upper half have no token.
        float weights[ROW_HEADS];
#pragma unroll
        for (u32 head = 0; head < ROW_HEADS; head++) {
            weights[head] = SMALLEST;
        }
        // Four tokens at once, eight lanes to each.
        for (u32 first = low / 4u * 4u; first < high; first += 4u) {
            u32 token = first + lane / 8u;
            float scores[ROW_HEADS] = {};
            for (u32 pair = lane % 8u; pair < pairs; pair += 8u) {
                Pair key = load_pair<TYPE>(keys + token * row_bytes, pair);
#pragma unroll
                for (u32 head = 0; head < ROW_HEADS; head++) {
                    const float* query = queries + head * a.dim + 2u * pair;
                    scores[head] += query[0] * key.x + query[1] * key.y;
                }
            }
            bool is_mine = lane / 4u * 4u == first && lane >= low && lane < high;
#pragma unroll
            for (u32 head = 0; head < ROW_HEADS; head++) {
                float score = scores[head];
                score += __shfl_xor_sync(ALL_LANES, score, 4u);
                score += __shfl_xor_sync(ALL_LANES, score, 2u);
                score += __shfl_xor_sync(ALL_LANES, score, 1u);
                score = __shfl_sync(ALL_LANES, score, lane % 4u * 8u);
                weights[head] = is_mine ? score : weights[head];
            }
        }
#pragma unroll
        for (u32 head = 0; head < ROW_HEADS; head++) {
            float now = fmaxf(largest[head], largest_of_warp(weights[head]));
            float shrink = expf(largest[head] - now);
            weights[head] = expf(weights[head] - now);
            largest[head] = now;
            sum[head] = sum[head] * shrink + sum_of_warp(weights[head]);
#pragma unroll
            for (u32 j = 0; j < 2u * PAIRS; j++) {
                values[head][j] *= shrink;
            }
        }
        const u8* rows = a.pool + plane_at(block, 1, a.kv_heads, unit.kv_head, a.dim, TYPE);
        for (u32 token = low; token < high; token++) {
            float weight[ROW_HEADS];
#pragma unroll
            for (u32 head = 0; head < ROW_HEADS; head++) {
                weight[head] = __shfl_sync(ALL_LANES, weights[head], token);
            }
#pragma unroll
            for (u32 j = 0; j < PAIRS; j++) {
                u32 pair = lane + LANES * j;
                if (pair < pairs) {
                    Pair value = load_pair<TYPE>(rows + token * row_bytes, pair);
#pragma unroll
                    for (u32 head = 0; head < ROW_HEADS; head++) {
                        values[head][2u * j] += weight[head] * value.x;
                        values[head][2u * j + 1u] += weight[head] * value.y;
                    }
                }
            }
        }
    }

    u32 width = partial_width(a);
#pragma unroll
    for (u32 head = 0; head < ROW_HEADS; head++) {
        float* mine = partials + (warp * ROW_HEADS + head) * width;
        if (lane == 0u) {
            mine[0] = largest[head];
            mine[1] = sum[head];
        }
#pragma unroll
        for (u32 j = 0; j < PAIRS; j++) {
            u32 pair = lane + LANES * j;
            if (pair < pairs) {
                mine[2u + 2u * pair] = values[head][2u * j];
                mine[3u + 2u * pair] = values[head][2u * j + 1u];
            }
        }
    }
    __syncthreads();
    float* out = a.partial + (u64)blockIdx.x * ROW_HEADS * width;
    for (u32 at = threadIdx.x; at < unit.heads * width; at += blockDim.x) {
        u32 head = at / width, number = at % width;
        float most = SMALLEST;
        for (u32 of = 0; of < ROW_WARPS; of++) {
            most = fmaxf(most, partials[(of * ROW_HEADS + head) * width]);
        }
        float total = number == 0u ? most : 0.0f;
        for (u32 of = 0; of < ROW_WARPS && number > 0u; of++) {
            const float* mine = partials + (of * ROW_HEADS + head) * width;
            // A warp that saw nothing has nothing to add.
            total += mine[0] == SMALLEST ? 0.0f : mine[number] * expf(mine[0] - most);
        }
        out[at] = total;
    }
}

// What the units of one row and its heads found. One block each.
struct Merge {
    const float* partial;
    const Unit* units;
    // First unit, and how many.
    const u32* merges;
    u8* out;
    u32 heads;
    u32 dim;
    u32 out_type;
    u32 unused;
};

static_assert(sizeof(Merge) == 6 * 8, "as the host has it");

extern "C" __global__ void merge(const Merge a) {
    u32 first = a.merges[2u * blockIdx.x], count = a.merges[2u * blockIdx.x + 1u];
    const Unit unit = a.units[first];
    u32 width = a.dim + 2u;
    const float* partial = a.partial + (u64)first * ROW_HEADS * width;
    u64 out = (u64)unit.row * a.heads * a.dim + unit.head * a.dim;
    for (u32 at = threadIdx.x; at < unit.heads * a.dim; at += blockDim.x) {
        u32 head = at / a.dim, channel = at % a.dim;
        float most = SMALLEST;
        for (u32 of = 0; of < count; of++) {
            most = fmaxf(most, partial[(of * ROW_HEADS + head) * width]);
        }
        float sum = 0.0f, value = 0.0f;
        for (u32 of = 0; of < count; of++) {
            const float* found = partial + (of * ROW_HEADS + head) * width;
            if (found[0] != SMALLEST) {
                float shrink = expf(found[0] - most);
                sum += found[1] * shrink;
                value += found[2u + channel] * shrink;
            }
        }
        store(a.out + (out + at) * size_of(a.out_type), a.out_type, value / sum);
    }
}

struct alignas(16) Quad {
    float x, y, z, w;
};

// 128 threads, of which 16 share four rows: each has two keys of a tile, and up to eight
// channels of the result.
#define TILE_THREADS 128u
#define ROWS_OF_THREAD 4u
#define THREADS_OF_ROW 16u

template <u32 TYPE> __device__ __forceinline__ void attend_tile(const Attend& a) {
    DYNAMIC_SHARED(shared);
    const Unit unit = a.units[blockIdx.x];
    u32 rows = unit.tokens * unit.heads;
    u32 dim = a.dim, width = (dim + 3u) / 4u * 4u;
    // Rows begin in other banks.
    u32 stride = width + 4u;
    float* queries = shared;
    float* tile = queries + TILE_ROWS * stride;
    float* weights = tile + TILE_KEYS * stride;
    u32 group = threadIdx.x / THREADS_OF_ROW, column = threadIdx.x % THREADS_OF_ROW;

    for (u32 at = threadIdx.x; at < TILE_ROWS * stride; at += TILE_THREADS) {
        u32 row = at / stride, channel = at % stride;
        float query = 0.0f;
        if (row < rows && channel < dim) {
            u64 from = (u64)(unit.row + row / unit.heads) * a.stride;
            query = a.queries[from + (unit.head + row % unit.heads) * dim + channel] * a.scale;
        }
        queries[at] = query;
    }
    u32 seen[ROWS_OF_THREAD], end[ROWS_OF_THREAD];
    float largest[ROWS_OF_THREAD], sum[ROWS_OF_THREAD], values[ROWS_OF_THREAD][8];
#pragma unroll
    for (u32 i = 0; i < ROWS_OF_THREAD; i++) {
        u32 row = group * ROWS_OF_THREAD + i;
        u32 position = row < rows ? a.positions[unit.row + row / unit.heads] : 0u;
        seen[i] = first_seen(a, position);
        end[i] = row < rows ? position + 1u : 0u;
        largest[i] = SMALLEST;
        sum[i] = 0.0f;
#pragma unroll
        for (u32 j = 0; j < 8u; j++) {
            values[i][j] = 0.0f;
        }
    }
    u32 last = a.positions[unit.row + unit.tokens - 1u];
    u64 row_bytes = dim * size_of(TYPE);
    for (u32 slot = unit.first; slot < unit.end; slot += TILE_KEYS / BLOCK_TOKENS) {
        u32 pages[TILE_KEYS / BLOCK_TOKENS];
#pragma unroll
        for (u32 j = 0; j < TILE_KEYS / BLOCK_TOKENS; j++) {
            pages[j] = slot + j < unit.end ? page_of(a, unit, slot + j) : NONE;
        }
        // Keys, then values, in the same memory.
#pragma unroll
        for (u32 plane = 0; plane < 2u; plane++) {
            __syncthreads();
            for (u32 at = threadIdx.x; at < TILE_KEYS * (stride / 2u); at += TILE_THREADS) {
                u32 key = at / (stride / 2u), pair = at % (stride / 2u);
                u32 page = pages[0];
#pragma unroll
                for (u32 j = 1; j < TILE_KEYS / BLOCK_TOKENS; j++) {
                    page = key / BLOCK_TOKENS == j ? pages[j] : page;
                }
                u32 token = key % BLOCK_TOKENS;
                Pair both = {0.0f, 0.0f};
                // What was not written yet is no number perhaps, and would stay none.
                if (page != NONE && page * BLOCK_TOKENS + token <= last && pair < dim / 2u) {
                    u32 block = a.blocks[unit.table + page];
                    const u8* head = a.pool
                        + plane_at(block, plane, a.kv_heads, unit.kv_head, dim, TYPE);
                    both = load_pair<TYPE>(head + token * row_bytes, pair);
                }
                *(Pair*)(tile + key * stride + 2u * pair) = both;
            }
            __syncthreads();
            if (plane == 0u) {
                float scores[ROWS_OF_THREAD][2] = {};
                for (u32 at = 0; at < width; at += 4u) {
                    Quad keys[2];
                    keys[0] = *(const Quad*)(tile + column * stride + at);
                    keys[1] = *(const Quad*)(tile + (column + THREADS_OF_ROW) * stride + at);
#pragma unroll
                    for (u32 i = 0; i < ROWS_OF_THREAD; i++) {
                        u32 row = group * ROWS_OF_THREAD + i;
                        Quad query = *(const Quad*)(queries + row * stride + at);
#pragma unroll
                        for (u32 j = 0; j < 2u; j++) {
                            scores[i][j] += query.x * keys[j].x + query.y * keys[j].y
                                + query.z * keys[j].z + query.w * keys[j].w;
                        }
                    }
                }
#pragma unroll
                for (u32 i = 0; i < ROWS_OF_THREAD; i++) {
                    float now = largest[i];
#pragma unroll
                    for (u32 j = 0; j < 2u; j++) {
                        u32 position = pages[j] * BLOCK_TOKENS + column;
                        bool sees = pages[j] != NONE && position >= seen[i] && position < end[i];
                        scores[i][j] = sees ? scores[i][j] : SMALLEST;
                        now = fmaxf(now, scores[i][j]);
                    }
                    for (u32 apart = THREADS_OF_ROW / 2u; apart > 0u; apart /= 2u) {
                        now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, apart));
                    }
                    // Of rows that have seen nothing yet, all weights are zero.
                    bool any = now != SMALLEST;
                    float shrink = any ? expf(largest[i] - now) : 0.0f;
                    largest[i] = now;
                    float added = 0.0f;
#pragma unroll
                    for (u32 j = 0; j < 2u; j++) {
                        float weight = any ? expf(scores[i][j] - now) : 0.0f;
                        u32 row = group * ROWS_OF_THREAD + i;
                        weights[row * (TILE_KEYS + 1u) + column + THREADS_OF_ROW * j] = weight;
                        added += weight;
                    }
                    for (u32 apart = THREADS_OF_ROW / 2u; apart > 0u; apart /= 2u) {
                        added += __shfl_xor_sync(ALL_LANES, added, apart);
                    }
                    sum[i] = sum[i] * shrink + added;
#pragma unroll
                    for (u32 j = 0; j < 8u; j++) {
                        values[i][j] *= shrink;
                    }
                }
            } else {
                for (u32 key = 0; key < TILE_KEYS; key++) {
                    float weight[ROWS_OF_THREAD];
#pragma unroll
                    for (u32 i = 0; i < ROWS_OF_THREAD; i++) {
                        weight[i] = weights[(group * ROWS_OF_THREAD + i) * (TILE_KEYS + 1u) + key];
                    }
#pragma unroll
                    for (u32 half = 0; half < 2u; half++) {
                        u32 at = column * 4u + half * 4u * THREADS_OF_ROW;
                        if (at < width) {
                            Quad value = *(const Quad*)(tile + key * stride + at);
#pragma unroll
                            for (u32 i = 0; i < ROWS_OF_THREAD; i++) {
                                values[i][4u * half] += weight[i] * value.x;
                                values[i][4u * half + 1u] += weight[i] * value.y;
                                values[i][4u * half + 2u] += weight[i] * value.z;
                                values[i][4u * half + 3u] += weight[i] * value.w;
                            }
                        }
                    }
                }
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < ROWS_OF_THREAD; i++) {
        u32 row = group * ROWS_OF_THREAD + i;
        if (row >= rows) {
            continue;
        }
        u64 out = (u64)(unit.row + row / unit.heads) * a.heads * dim
            + (unit.head + row % unit.heads) * dim;
#pragma unroll
        for (u32 j = 0; j < 8u; j++) {
            u32 channel = column * 4u + j / 4u * 4u * THREADS_OF_ROW + j % 4u;
            if (channel < dim) {
                u8* to = a.out + (out + channel) * size_of(a.out_type);
                store(to, a.out_type, values[i][j] / sum[i]);
            }
        }
    }
}

// By element type of the pages, and for rows by the widest head.
#define ATTEND_ROWS(name, type, pairs) \
    extern "C" __global__ void attend_rows_##name(const Attend a) { attend_row<type, pairs>(a); }
#define ATTEND(name, type) \
    ATTEND_ROWS(name##_64, type, 1) \
    ATTEND_ROWS(name##_128, type, 2) \
    ATTEND_ROWS(name##_256, type, 4) \
    ATTEND_ROWS(name##_512, type, 8) \
    extern "C" __global__ void attend_tiles_##name(const Attend a) { attend_tile<type>(a); }

ATTEND(f32, TYPE_F32)
ATTEND(f16, TYPE_F16)
ATTEND(bf16, TYPE_BF16)

// What a layer does row by row: embedding, norms, rotation, activation, and K and V into pages.
//
// A kernel takes one structure of arguments, whose fields and their order are those of the
// structure of the same name in launch.rs. Sums are f32. Follows numbers.cu; attention.cu
// follows. Compiled by NVRTC, and by a C++ compiler against emulation/warp.h, which has no GPU.

#define BLOCK_TOKENS 16u
#define NONE 0xffffffffu

#ifndef DYNAMIC_SHARED
// Of the size that a launch names.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]
#endif

__device__ __forceinline__ float sum_of_warp(float value) {
    for (u32 apart = LANES / 2u; apart > 0u; apart /= 2u) {
        value += __shfl_xor_sync(ALL_LANES, value, apart);
    }
    return value;
}

__device__ __forceinline__ float largest_of_warp(float value) {
    for (u32 apart = LANES / 2u; apart > 0u; apart /= 2u) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, apart));
    }
    return value;
}

// Bytes from the start of a layer of the pool to one head of one plane of a page. The order is
// [block][plane][kv_head][token][dim], as in host memory.
__device__ __forceinline__ u64 plane_at(
    u32 block, u32 plane, u32 kv_heads, u32 kv_head, u32 dim, u32 type
) {
    u64 head = ((u64)block * 2u + plane) * kv_heads + kv_head;
    return head * BLOCK_TOKENS * dim * size_of(type);
}

// One block a row.
struct Embed {
    const u32* tokens;
    const u8* table;
    float* stream;
    u32 hidden;
    u32 type;
};

extern "C" __global__ void embed(const Embed a) {
    u32 row = blockIdx.x;
    const u8* from = a.table + (u64)a.tokens[row] * a.hidden * size_of(a.type);
    for (u32 at = threadIdx.x; at < a.hidden; at += blockDim.x) {
        a.stream[(u64)row * a.hidden + at] = load(from + at * size_of(a.type), a.type);
    }
}

// Cosines, then sines, of each row's position. One block a row.
struct Angles {
    const u32* positions;
    const float* radians;
    float* angles;
    u32 pairs;
    float factor;
};

extern "C" __global__ void angles(const Angles a) {
    u32 row = blockIdx.x;
    for (u32 at = threadIdx.x; at < a.pairs; at += blockDim.x) {
        // Rounded before its cosine is taken, as on the CPU.
        float angle = __fmul_rn((float)a.positions[row], a.radians[at]);
        float* out = a.angles + (u64)row * 2u * a.pairs;
        out[at] = __fmul_rn((float)cos((double)angle), a.factor);
        out[a.pairs + at] = __fmul_rn((float)sin((double)angle), a.factor);
    }
}

// RMSNorm of the residual stream. One block a row; a float of shared memory for each warp.
struct Norm {
    const float* stream;
    const float* weight;
    u8* out;
    u32 width;
    u32 type;
    float eps;
};

extern "C" __global__ void rms_norm(const Norm a) {
    DYNAMIC_SHARED(sums);
    u32 row = blockIdx.x;
    const float* from = a.stream + (u64)row * a.width;
    float sum = 0.0f;
    for (u32 at = threadIdx.x; at < a.width; at += blockDim.x) {
        sum += from[at] * from[at];
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % LANES == 0u) {
        sums[threadIdx.x / LANES] = sum;
    }
    __syncthreads();
    sum = 0.0f;
    for (u32 warp = 0; warp < blockDim.x / LANES; warp++) {
        sum += sums[warp];
    }
    float scale = 1.0f / sqrtf(sum / (float)a.width + a.eps);
    u8* out = a.out + (u64)row * a.width * size_of(a.type);
    for (u32 at = threadIdx.x; at < a.width; at += blockDim.x) {
        store(out + at * size_of(a.type), a.type, from[at] * scale * a.weight[at]);
    }
}

#define MOST_PAIRS_OF_LANE 8u

// Bias, norm and rotation of each head of Q and K, bias of each head of V; in place. One warp a
// head, heads of a row after those of the row before.
struct Heads {
    float* qkv;
    // Absent where zero.
    const float* bias;
    const float* q_norm;
    const float* k_norm;
    const float* angles;
    u32 rows;
    u32 heads;
    u32 kv_heads;
    u32 dim;
    float eps;
};

extern "C" __global__ void heads(const Heads a) {
    u32 lane = threadIdx.x % LANES;
    u32 of_row = a.heads + 2u * a.kv_heads;
    u64 at = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    u32 row = (u32)(at / of_row);
    u32 head = (u32)(at % of_row);
    if (row >= a.rows) {
        return;
    }
    float* values = a.qkv + at * a.dim;
    u32 pairs = a.dim / 2u;
    float low[MOST_PAIRS_OF_LANE] = {}, high[MOST_PAIRS_OF_LANE] = {};
    float sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < MOST_PAIRS_OF_LANE; j++) {
        u32 pair = lane + LANES * j;
        if (pair < pairs) {
            low[j] = values[pair];
            high[j] = values[pairs + pair];
            if (a.bias) {
                low[j] += a.bias[head * a.dim + pair];
                high[j] += a.bias[head * a.dim + pairs + pair];
            }
            sum += low[j] * low[j] + high[j] * high[j];
        }
    }
    bool is_value = head >= a.heads + a.kv_heads;
    const float* weight = head < a.heads ? a.q_norm : a.k_norm;
    float scale = 1.0f;
    if (weight && !is_value) {
        scale = 1.0f / sqrtf(sum_of_warp(sum) / (float)a.dim + a.eps);
    }
    const float* angles = a.angles + (u64)row * a.dim;
#pragma unroll
    for (u32 j = 0; j < MOST_PAIRS_OF_LANE; j++) {
        u32 pair = lane + LANES * j;
        if (pair < pairs) {
            if (is_value) {
                values[pair] = low[j];
                values[pairs + pair] = high[j];
                continue;
            }
            float x = low[j], y = high[j];
            if (weight) {
                x = x * scale * weight[pair];
                y = y * scale * weight[pairs + pair];
            }
            float cosine = angles[pair], sine = angles[pairs + pair];
            values[pair] = x * cosine - y * sine;
            values[pairs + pair] = y * cosine + x * sine;
        }
    }
}

// K and V of each row into its page. One block a row.
struct Append {
    const float* qkv;
    // A layer.
    u8* pool;
    // By row: its block · BLOCK_TOKENS + its token in the block; NONE for rows that stay as the
    // pages are.
    const u32* places;
    u32 heads;
    u32 kv_heads;
    u32 dim;
    u32 type;
};

extern "C" __global__ void append(const Append a) {
    u32 row = blockIdx.x;
    u32 place = a.places[row];
    if (place == NONE) {
        return;
    }
    u32 width = a.kv_heads * a.dim;
    const float* from = a.qkv + ((u64)row * (a.heads + 2u * a.kv_heads) + a.heads) * a.dim;
    for (u32 at = threadIdx.x; at < 2u * width; at += blockDim.x) {
        u32 plane = at / width, kv_head = at % width / a.dim, channel = at % a.dim;
        u8* head = a.pool
            + plane_at(place / BLOCK_TOKENS, plane, a.kv_heads, kv_head, a.dim, a.type);
        u32 in_head = place % BLOCK_TOKENS * a.dim + channel;
        store(head + in_head * size_of(a.type), a.type, from[at]);
    }
}

// silu(gate) · up. A thread an element.
struct Activate {
    // By row: gates, then ups.
    const float* gate_up;
    // Of both; absent where zero.
    const float* bias;
    u8* out;
    u32 rows;
    u32 width;
    u32 type;
};

extern "C" __global__ void activate(const Activate a) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (u64)a.rows * a.width) {
        return;
    }
    u64 row = at / a.width;
    u32 channel = (u32)(at % a.width);
    float gate = a.gate_up[row * 2u * a.width + channel];
    float up = a.gate_up[(row * 2u + 1u) * a.width + channel];
    if (a.bias) {
        gate += a.bias[channel];
        up += a.bias[a.width + channel];
    }
    store(a.out + at * size_of(a.type), a.type, gate / (1.0f + expf(-gate)) * up);
}

// A bias to each row. A thread an element.
struct AddBias {
    float* values;
    const float* bias;
    u32 rows;
    u32 width;
};

extern "C" __global__ void add_bias(const AddBias a) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < (u64)a.rows * a.width) {
        a.values[at] += a.bias[at % a.width];
    }
}

// Some rows of a matrix, in words of 4 bytes. One block a row of what becomes of it.
struct Gather {
    const u32* from;
    u32* to;
    const u32* rows;
    u32 width;
};

extern "C" __global__ void gather(const Gather a) {
    const u32* from = a.from + (u64)a.rows[blockIdx.x] * a.width;
    u32* to = a.to + (u64)blockIdx.x * a.width;
    for (u32 at = threadIdx.x; at < a.width; at += blockDim.x) {
        to[at] = from[at];
    }
}

// The largest logit of each row: the first of those that are equal, NONE if one is not finite.
// One block a row; two words of shared memory for each warp.
struct Argmax {
    const float* logits;
    u32* best;
    u32 vocab;
};

__device__ __forceinline__ bool is_better(float logit, u32 id, float than, u32 than_id) {
    return logit > than || (logit == than && id < than_id);
}

extern "C" __global__ void argmax(const Argmax a) {
    DYNAMIC_SHARED(found);
    const float* logits = a.logits + (u64)blockIdx.x * a.vocab;
    u32 warps = blockDim.x / LANES, warp = threadIdx.x / LANES;
    float best = __uint_as_float(0xff800000u);
    u32 best_id = NONE;
    bool finite = true;
    for (u32 at = threadIdx.x; at < a.vocab; at += blockDim.x) {
        float logit = logits[at];
        finite = finite && (__float_as_uint(logit) & 0x7f800000u) != 0x7f800000u;
        if (is_better(logit, at, best, best_id)) {
            best = logit;
            best_id = at;
        }
    }
    for (u32 apart = LANES / 2u; apart > 0u; apart /= 2u) {
        float other = __shfl_xor_sync(ALL_LANES, best, apart);
        u32 other_id = __shfl_sync(ALL_LANES, best_id, threadIdx.x % LANES ^ apart);
        if (is_better(other, other_id, best, best_id)) {
            best = other;
            best_id = other_id;
        }
    }
    if (__ballot_sync(ALL_LANES, finite) != ALL_LANES) {
        best_id = NONE;
    }
    if (threadIdx.x % LANES == 0u) {
        found[warp] = best;
        found[warps + warp] = __uint_as_float(best_id);
    }
    __syncthreads();
    if (threadIdx.x != 0u) {
        return;
    }
    // A warp without a logit has found nothing, which is less than all.
    bool all_finite = true;
    for (u32 other = 0; other < warps; other++) {
        u32 id = __float_as_uint(found[warps + other]);
        all_finite = all_finite && (id != NONE || other * LANES >= a.vocab);
        if (id != NONE && (best_id == NONE || is_better(found[other], id, best, best_id))) {
            best = found[other];
            best_id = id;
        }
    }
    a.best[blockIdx.x] = all_finite ? best_id : NONE;
}

// One layer of some tokens of a sequence between its pages and canonical order,
// [plane][kv_head][token][dim]. In words of 4 bytes. A thread a word.
struct Move {
    // A layer.
    u32* pool;
    u32* payload;
    const u32* blocks;
    u32 first_token;
    u32 tokens;
    u32 kv_heads;
    // Of a token's head.
    u32 row_words;
    u32 into_pages;
};

extern "C" __global__ void move(const Move a) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (u64)2u * a.kv_heads * a.tokens * a.row_words) {
        return;
    }
    u32 word = (u32)(at % a.row_words);
    u32 token = a.first_token + (u32)(at / a.row_words % a.tokens);
    // Plane · kv_heads + head.
    u32 head = (u32)(at / a.row_words / a.tokens);
    u64 page = (u64)a.blocks[token / BLOCK_TOKENS] * 2u * a.kv_heads + head;
    u64 in_pool = (page * BLOCK_TOKENS + token % BLOCK_TOKENS) * a.row_words + word;
    if (a.into_pages) {
        a.pool[in_pool] = a.payload[at];
    } else {
        a.payload[at] = a.pool[in_pool];
    }
}

static_assert(sizeof(Embed) == 4 * 8, "as the host has it");
static_assert(sizeof(Angles) == 4 * 8, "as the host has it");
static_assert(sizeof(Norm) == 5 * 8, "as the host has it");
static_assert(sizeof(Heads) == 8 * 8, "as the host has it");
static_assert(sizeof(Append) == 5 * 8, "as the host has it");
static_assert(sizeof(Activate) == 5 * 8, "as the host has it");
static_assert(sizeof(AddBias) == 3 * 8, "as the host has it");
static_assert(sizeof(Gather) == 4 * 8, "as the host has it");
static_assert(sizeof(Argmax) == 3 * 8, "as the host has it");
static_assert(sizeof(Move) == 6 * 8, "as the host has it");

// Element types, and rounding to them as CPUs do. Comes first in what is compiled.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define LANES 32u
#define ALL_LANES 0xffffffffu

#define TYPE_F32 0u
#define TYPE_F16 1u
#define TYPE_BF16 2u

__device__ __forceinline__ u16 to_bf16(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (u16)(bits >> 16 | 0x40u);
    }
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ u16 to_f16(float value) {
    u32 bits = __float_as_uint(value);
    u32 sign = bits >> 16 & 0x8000u;
    u32 size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) {
        // What is left of a payload stays.
        return (u16)(sign | 0x7e00u | (size >> 13 & 0x3ffu));
    }
#ifdef __CUDA_ARCH__
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
#else
    if (size >= 0x477ff000u) {
        return (u16)(sign | 0x7c00u);
    }
    if (size < 0x38800000u) {
        // Subnormal: adding one half leaves multiples of 2^-24, rounded.
        float shifted = __fadd_rn(__uint_as_float(size), 0.5f);
        return (u16)(sign | (__float_as_uint(shifted) - 0x3f000000u));
    }
    u32 rounded = size + 0xfffu + (size >> 13 & 1u);
    return (u16)(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

__device__ __forceinline__ void store(u8* out, u32 type, float value) {
    if (type == TYPE_F32) {
        *(u32*)out = __float_as_uint(value);
    } else {
        *(u16*)out = type == TYPE_F16 ? to_f16(value) : to_bf16(value);
    }
}

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ float from_f16(u16 bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    u32 sign = (u32)(bits & 0x8000u) << 16;
    u32 size = bits & 0x7fffu;
    if (size >= 0x7c00u) {
        return __uint_as_float(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    }
    // An exponent of 15 is one of 127; subnormals become normal on the way.
    float value = __fmul_rn(__uint_as_float(size << 13), 5192296858534827628530496329220096.0f);
    return __uint_as_float(sign | __float_as_uint(value));
#endif
}

__device__ __forceinline__ float load(const u8* from, u32 type) {
    if (type == TYPE_F32) {
        return *(const float*)from;
    }
    u16 bits = *(const u16*)from;
    return type == TYPE_F16 ? from_f16(bits) : from_bf16(bits);
}

__device__ __forceinline__ u32 size_of(u32 type) { return type == TYPE_F32 ? 4u : 2u; }

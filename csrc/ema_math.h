// The arithmetic of one element, for host and device. No other C++ file computes averages or rounds.
//
// All backends must give the same bits. So nothing here depends on the compiler's choices: a fused multiply-add is
// written where one is meant, and the build flags forbid any other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "chunk.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EMAN_FN __host__ __device__ __forceinline__
#else
#define EMAN_FN inline __attribute__((always_inline))
#endif

namespace eman {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

EMAN_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

EMAN_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// widen: exact conversion to the type in which the average is computed.
EMAN_FN double widen(double x) { return x; }
EMAN_FN float widen(float x) { return x; }
EMAN_FN float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
EMAN_FN float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // A half has a 5-bit exponent with bias 15 and 10 fraction bits, a float 8 bits with bias 127 and 23 fraction bits.
  // `magnitude` is the half's exponent and fraction, moved to their places in a float. All three results are computed
  // and one is selected, without branches, so that loops over elements are vectorized even without F16C instructions.
  // A normal half needs its exponent rebiased by 127 - 15 = 112. A subnormal one is m * 2^-24: put m into the fraction
  // of a float with value 2^-14 (exponent bits 113) and subtract 2^-14, which is exact and normalizes.
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t infinite_or_nan = magnitude | 0x7F800000u;
  const uint32_t bits = magnitude >= (31u << 23) ? infinite_or_nan : magnitude < (1u << 23) ? subnormal : normal;
  return float_of(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

#if !defined(__CUDA_ARCH__)
// Round to the nearest bfloat16, ties to even. Precondition: x is not a NaN, except one whose low 16 bits are 0. (The
// addition could carry from a NaN's fraction into the sign bit.)
EMAN_FN BFloat16 nearest_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}
#endif

// narrow: round to nearest, ties to even. A NaN stays a NaN, with an unspecified payload.
template <typename T>
EMAN_FN T narrow(double x);
template <>
EMAN_FN double narrow<double>(double x) {
  return x;
}

template <typename T>
EMAN_FN T narrow(float x);
template <>
EMAN_FN float narrow<float>(float x) {
  return x;
}
template <>
EMAN_FN BFloat16 narrow<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const BFloat16 nearest = nearest_bfloat16(x);
  return {static_cast<uint16_t>(x != x ? 0x7FC0u : nearest.bits)};
#endif
}
template <>
EMAN_FN Half narrow<Half>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  // As in widen, three results are computed and one is selected. 113 << 23 is 2^-14, the smallest normal half; from
  // 143 << 23, 2^16, on a half is infinite. (Numbers that round up to 2^16 become infinite through the carry.)
  // Subnormal: the last fraction bit of floats in [0.5, 1) is 2^-24, that of subnormal halves. So adding 0.5 rounds to
  // a subnormal half, and its bits are the difference to the bits of 0.5.
  // Normal: rebias the exponent, and round off 13 bits like nearest_bfloat16 rounds off 16.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t infinite_or_nan = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t bits = magnitude >= (143u << 23) ? infinite_or_nan : magnitude < (113u << 23) ? subnormal : normal;
  return {static_cast<uint16_t>(bits | ((bits_of(x) >> 16) & 0x8000u))};
#endif
}

// narrow_stochastic: round up or down at random, so that the expected value is x. `random` holds 16 uniform bits.
//
// Rounding down drops low bits of x. Let f be their value as a fraction of an ulp of the result. Adding a uniform
// number r in [0, 1) ulp before dropping them carries into the result with probability f, as required. Because r has 16
// bits, parts of f below 2^-16 are ignored. A NaN stays a NaN.
template <typename T>
EMAN_FN T narrow_stochastic(float x, uint32_t random);
template <>
EMAN_FN BFloat16 narrow_stochastic<BFloat16>(float x, uint32_t random) {
  return {static_cast<uint16_t>(x != x ? 0x7FC0u : (bits_of(x) + random) >> 16)};
}
template <>
EMAN_FN Half narrow_stochastic<Half>(float x, uint32_t random) {
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  const bool is_subnormal = magnitude < (113u << 23);
  // The ulp of a subnormal half is 2^-24. In units of 2^-40 that is 2^16, so the 16 bits can be added directly. Larger
  // numbers are replaced by 0 here, because converting a float that does not fit into the integer is undefined.
  const float small = is_subnormal ? float_of(magnitude) * float_of((127u + 40u) << 23) : 0.0f;
  const uint32_t subnormal = (static_cast<uint32_t>(small) + random) >> 16;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 3)) >> 13;
  const uint32_t infinite_or_nan = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t bits = magnitude >= (143u << 23) ? infinite_or_nan : is_subnormal ? subnormal : normal;
  return {static_cast<uint16_t>(bits | ((bits_of(x) >> 16) & 0x8000u))};
}

// Values that are not floating-point count as finite.
template <typename T>
EMAN_FN bool is_finite(T) {
  return true;
}
EMAN_FN bool is_finite(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }
EMAN_FN bool is_finite(double x) { return x - x == 0.0; }
EMAN_FN bool is_finite(BFloat16 x) { return (x.bits & 0x7F80u) != 0x7F80u; }
EMAN_FN bool is_finite(Half x) { return (x.bits & 0x7C00u) != 0x7C00u; }

// The random bits for stochastic rounding. Philox is a counter-based generator: its output is a function of a key and a
// counter, and no state is stored. The key is (seed, step). Elements are numbered through the whole update (see
// Chunk::extra), and the counter is the group of eight, n / 8, that element n belongs to. One call of Philox gives four
// 32-bit words, which are eight draws of 16 bits: n % 8 selects word n % 8 / 2, and n % 2 its lower or upper half. So
// an element gets the same bits on every backend and for any chunk size.
struct Random {
  uint32_t words[4];
  EMAN_FN uint32_t operator[](uint32_t element) const {
    // Selected instead of indexed: with an index that is not a compile-time constant, the GPU compiler would keep the
    // array in local memory instead of registers.
    const uint32_t low = element & 4 ? words[2] : words[0], high = element & 4 ? words[3] : words[1];
    return ((element & 2 ? high : low) >> (element & 1 ? 16 : 0)) & 0xFFFFu;
  }
};

// Philox 4x32-10. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
struct Philox {
  static constexpr int kRounds = 10;
  uint32_t seed, step;

  EMAN_FN static void round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
  }
  EMAN_FN static void next(uint32_t& k0, uint32_t& k1) {
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  EMAN_FN Random operator()(uint64_t group) const {
    uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = seed, k1 = step;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kRounds; ++i, next(k0, k1)) round(c0, c1, c2, c3, k0, k1);
    return {{c0, c1, c2, c3}};
  }
};

EMAN_FN float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
EMAN_FN double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// teacher + weight * (student - teacher), with a single rounding after the difference. From weight 0.5 on the mirrored
// form, student + (weight - 1) * (student - teacher), so that weight 1 gives exactly the student. These are the bits of
// torch.lerp.
// The usual m * t + (1 - m) * s differs: in float32 its two rounded coefficients do not add up to 1, so that a teacher
// that equals its student would drift away from it.
// The difference of equal infinities would be NaN, and is set to 0: the teacher keeps its value. At weight 1 the
// difference is multiplied by 0, which would give NaN if it is not finite, and is set to 0 as well.
template <typename Real>
struct Ema {
  Real weight;
  EMAN_FN Real operator()(Real teacher, Real student) const {
    const bool near_teacher = weight < Real(0.5);
    const Real coefficient = near_teacher ? weight : weight - Real(1), base = near_teacher ? teacher : student;
    const Real difference = student == teacher || weight == Real(1) ? Real(0) : student - teacher;
    return fused_multiply_add(coefficient, difference, base);
  }
};

// The weight, 1 - momentum, in double and rounded once to float: one for each type in which averages are computed.
struct Weight {
  double in_double;
  float in_float;
  Weight() = default;
  explicit EMAN_FN Weight(double momentum) : in_double(1.0 - momentum), in_float(static_cast<float>(1.0 - momentum)) {}
  EMAN_FN Ema<float> ema(float) const { return {in_float}; }
  EMAN_FN Ema<double> ema(double) const { return {in_double}; }
  EMAN_FN bool is_zero() const { return in_double == 0.0; }
  EMAN_FN bool is_one(float) const { return in_float == 1.0f; }
  EMAN_FN bool is_one(double) const { return in_double == 1.0; }
};

// A rule computes the new value of a teacher's element. The kernels are templates over the two rules.
//
//   kReadsTeacher       whether the result depends on the teacher's old value
//   kRounds             whether the teacher is half-precision, so that stochastic rounding applies
//   kCasts              whether the teacher can have a low-precision copy
//   is_noop             at momentum 1 nothing is written, so that even a NaN keeps its bits
//   copies              whether the result is just the student's value: at weight 1, and for copies
//   replaces_nonfinite  use the student's element in the place of a teacher's that is NaN or infinite
template <typename T, typename S>
struct EmaRule {
  using Teacher = T;
  using Student = S;
  static constexpr bool kReadsTeacher = true;
  static constexpr bool kRounds = std::is_same<T, BFloat16>::value || std::is_same<T, Half>::value;
  static constexpr bool kCasts = std::is_same<T, float>::value;
  Weight weight;
  bool replaces_nonfinite = false;
  EMAN_FN bool is_noop() const { return weight.is_zero(); }
  EMAN_FN bool copies() const { return weight.is_one(widen(T{})); }
  EMAN_FN T operator()(T teacher, S student) const {
#if !defined(__CUDA_ARCH__)
    // Averages of bfloat16 values fulfill nearest_bfloat16's precondition: their NaNs have low bits of 0. Leaving out
    // the check for NaNs saves a sixth of the time.
    if constexpr (std::is_same<T, BFloat16>::value && std::is_same<S, BFloat16>::value) {
      return nearest_bfloat16(average(teacher, student));
    }
#endif
    return narrow<T>(average(teacher, student));
  }
  EMAN_FN T copied(S student) const { return narrow<T>(widen(student)); }
  EMAN_FN T stochastic(T teacher, S student, uint32_t random) const {
    if constexpr (kRounds) return narrow_stochastic<T>(average(teacher, student), random);
    return (*this)(teacher, student);
  }
  EMAN_FN auto average(T teacher, S student) const {
    const auto t = widen(teacher);
    const auto s = static_cast<decltype(t)>(widen(student));
    return weight.ema(t)(replaces_nonfinite && !is_finite(teacher) ? s : t, s);
  }
};

template <typename U>
struct CopyRule {
  using Teacher = U;
  using Student = U;
  static constexpr bool kReadsTeacher = false;
  static constexpr bool kRounds = false;
  static constexpr bool kCasts = false;
  Weight weight;
  bool replaces_nonfinite = false;
  EMAN_FN bool is_noop() const { return false; }
  EMAN_FN bool copies() const { return true; }
  EMAN_FN U operator()(U, U student) const { return student; }
  EMAN_FN U copied(U student) const { return student; }
  EMAN_FN U stochastic(U, U student, uint32_t) const { return student; }
};

// Calls visit with the rule of a pair code. visit is a generic lambda: each case compiles it for other types.
template <typename Visit>
EMAN_FN void with_rule(uint16_t pair, const Weight& weight, Visit visit) {
  switch (pair) {
#define EMAN_CASE(CODE, T, S)     \
  case CODE:                      \
    visit(EmaRule<T, S>{weight}); \
    break;
    EMAN_EMA_PAIRS(EMAN_CASE)
#undef EMAN_CASE
#define EMAN_CASE(CODE, U)      \
  case CODE:                    \
    visit(CopyRule<U>{weight}); \
    break;
    EMAN_COPY_PAIRS(EMAN_CASE)
#undef EMAN_CASE
  }
}

// Calls visit with an element whose type has the width of a copy's pair code.
template <typename Visit>
EMAN_FN void with_width(uint16_t pair, Visit visit) {
  switch (pair) {
#define EMAN_CASE(CODE, U) \
  case CODE:               \
    visit(U{});            \
    break;
    EMAN_COPY_PAIRS(EMAN_CASE)
#undef EMAN_CASE
  }
}

}  // namespace eman

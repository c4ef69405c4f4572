// The arithmetic of one element, for host and device: the only place where it is written in C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

// widen: exact, into the type that the arithmetic is done in.
EMAN_FN double widen(double x) { return x; }
EMAN_FN float widen(float x) { return x; }
EMAN_FN float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
EMAN_FN float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Three branch-free cases, so that the loop over elements vectorises without F16C.
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t infinite_or_nan = magnitude | 0x7F800000u;
  const uint32_t bits = magnitude >= (31u << 23) ? infinite_or_nan : magnitude < (1u << 23) ? subnormal : normal;
  return float_of(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

// narrow: one rounding to nearest even. A NaN stays a NaN, its payload unspecified.
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
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
#endif
}
template <>
EMAN_FN Half narrow<Half>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  // Adding 0.5 leaves exactly the bits of a subnormal half in a float's last place, rounded by the adder.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t infinite_or_nan = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t bits = magnitude >= (143u << 23) ? infinite_or_nan : magnitude < (113u << 23) ? subnormal : normal;
  return {static_cast<uint16_t>(bits | ((bits_of(x) >> 16) & 0x8000u))};
#endif
}

EMAN_FN float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
EMAN_FN double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// teacher + weight * (student - teacher) with one rounding after the difference; from weight 0.5 on the mirrored form,
// so that weight 1 gives exactly the student. These are the bits of torch.lerp; m * t + (1 - m) * s is not the same:
// its two rounded coefficients do not add to 1, and a teacher equal to its student would drift away from it.
template <typename Real>
struct Ema {
  Real weight;
  EMAN_FN Real operator()(Real teacher, Real student) const {
    const Real difference = student - teacher;
    return weight < Real(0.5) ? fused_multiply_add(weight, difference, teacher)
                              : fused_multiply_add(weight - Real(1), difference, student);
  }
};

// The weight, 1 - momentum, as each arithmetic takes it: rounded once, from double.
struct Weight {
  double in_double;
  float in_float;
  explicit EMAN_FN Weight(double momentum) : in_double(1.0 - momentum), in_float(static_cast<float>(1.0 - momentum)) {}
  EMAN_FN Ema<float> ema(float) const { return {in_float}; }
  EMAN_FN Ema<double> ema(double) const { return {in_double}; }
};

// What becomes of one element of a pair. The kernels are templates over these two.
template <typename T, typename S>
struct EmaRule {
  using Teacher = T;
  using Student = S;
  static constexpr bool kReadsTeacher = true;
  Weight weight;
  EMAN_FN T operator()(T teacher, S student) const {
    const auto t = widen(teacher);
    return narrow<T>(weight.ema(t)(t, widen(student)));
  }
};

template <typename U>
struct CopyRule {
  using Teacher = U;
  using Student = U;
  static constexpr bool kReadsTeacher = false;
  EMAN_FN U operator()(U, U student) const { return student; }
};

// Calls visit with the rule of a pair code.
template <typename Visit>
EMAN_FN void with_rule(uint16_t pair, const Weight& weight, Visit visit) {
  switch (pair) {
#define EMAN_CASE(CODE, T, S)     \
  case CODE:                      \
    visit(EmaRule<T, S>{weight}); \
    break;
    EMAN_EMA_PAIRS(EMAN_CASE)
#undef EMAN_CASE
#define EMAN_CASE(CODE, U) \
  case CODE:               \
    visit(CopyRule<U>{});  \
    break;
    EMAN_COPY_PAIRS(EMAN_CASE)
#undef EMAN_CASE
  }
}

}  // namespace eman

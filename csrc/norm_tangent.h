// Norm, ReLU and max-pool of one task with derivatives along a direction, by the kernels of cpu/norm_tangent.h.
#pragma once
#include <cstdint>

#include "arena.h"
#include "cpu/norm_tangent.h"
#include "norm_relu_pool.h"

namespace lk {

// What the way back takes from the derivative of the forward pass.
struct NormMoments {
  double *mean, *turn;  // [channels]: of z_dot; of (z - mean) z_dot
};

// The parts' sums [parts, count, channels], added up in one order into the first.
inline double* added(double* partial, int64_t parts, int64_t values) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < values; ++i) partial[i] += partial[part * values + i];
  return partial;
}

// gamma_dot, beta_dot [channels], null for zeros; p as run_norm_relu_pool left it, with z_dot and y_dot -> y_dot, moments
template <typename T>
void run_norm_tangent(NormTangent<T> p, const T* gamma_dot, const T* beta_dot, const NormMoments& moments, Arena& arena) {
  const Arena::Mark mark = arena.mark();
  const int64_t C = p.channels, parts = p.images * p.slabs;
  const double pixels = double(p.images * p.height * p.width);
  const auto& kernels = norm_tangent_kernels<T>();
  for (int64_t c = 0; c < C; ++c) moments.mean[c] = moments.turn[c] = 0.0;
  if (p.z_dot != nullptr) {
    p.partial = arena.take<double>(parts * kForwardSums * C);
    over_threads(kernels.forward_sums, p, parts);
    const double* sums = added(p.partial, parts, kForwardSums * C);
    for (int64_t c = 0; c < C; ++c) moments.mean[c] = sums[c] / pixels, moments.turn[c] = sums[C + c] / pixels;
  }
  T *const of_d = arena.take<T>(C), *const of_z_dot = arena.take<T>(C), *const level = arena.take<T>(C);
  for (int64_t c = 0; c < C; ++c) {
    const double r = double(p.rstd[c]), a = double(p.gamma[c]) * r;
    of_d[c] = T((gamma_dot == nullptr ? 0.0 : double(gamma_dot[c]) * r) - a * r * r * moments.turn[c]);
    of_z_dot[c] = T(a);
    level[c] = T((beta_dot == nullptr ? 0.0 : double(beta_dot[c])) - a * moments.mean[c]);
  }
  p.of_d = of_d, p.of_z_dot = of_z_dot, p.level = level;
  over_threads(kernels.apply, p, p.images * (p.height / p.pool));
  arena.rewind(mark);
}

// gy, gy_dot and what the forward pass left -> dgamma, dbeta, their derivatives, dz unless it is null, and dz_dot unless
// it is null
template <typename T>
void run_norm_tangent_grad(NormTangent<T> p, const T* gamma_dot, const NormMoments& moments, T* dgamma_dot, T* dbeta_dot,
                           Arena& arena) {
  const Arena::Mark mark = arena.mark();
  const int64_t C = p.channels, parts = p.images * p.slabs;
  const double share = 1.0 / double(p.images * p.height * p.width);
  const auto& kernels = norm_tangent_kernels<T>();
  p.partial = arena.take<double>(parts * kBackwardSums * C);
  over_threads(kernels.backward_sums, p, parts);
  const double* sums = added(p.partial, parts, kBackwardSums * C);
  T* rows[7];
  for (T*& row : rows) row = arena.take<T>(C);
  for (int64_t c = 0; c < C; ++c) {
    const double g = sums[c], gd = sums[C + c], g_dot = sums[2 * C + c], g_dot_d = sums[3 * C + c], gz = sums[4 * C + c];
    const double r = double(p.rstd[c]), r_dot = -r * r * r * moments.turn[c], m = moments.mean[c];
    const double a = double(p.gamma[c]) * r;
    const double a_dot = (gamma_dot == nullptr ? 0.0 : double(gamma_dot[c]) * r) + double(p.gamma[c]) * r_dot;
    const double slope = r * gd, slope_dot = r * g_dot_d + r * gz - r * m * g + r_dot * gd;  // dgamma and its derivative
    p.dgamma[c] = T(slope), p.dbeta[c] = T(g);
    dgamma_dot[c] = T(slope_dot), dbeta_dot[c] = T(g_dot);
    rows[0][c] = T(a);
    rows[1][c] = T(a * r * slope * share);
    rows[2][c] = T(a * g * share);
    rows[3][c] = T(a_dot);
    rows[4][c] = T(-share * (a_dot * r * slope + a * r_dot * slope + a * r * slope_dot));
    rows[5][c] = T(-share * a * r * slope);
    rows[6][c] = T(-share * (a_dot * g + a * g_dot - a * r * m * slope));
  }
  p.of_g = rows[0], p.slope = rows[1], p.constant = rows[2], p.g_turn = rows[3], p.d_turn = rows[4], p.z_dot_turn = rows[5];
  p.constant_turn = rows[6];
  if (p.dz_dot != nullptr) over_threads(kernels.dense, p, p.images * ((p.height + p.pool - 1) / p.pool));
  arena.rewind(mark);
}

}  // namespace lk

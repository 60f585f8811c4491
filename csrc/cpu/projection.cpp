// The projection shortcut on the CPU: blocks of rows, each gathered, multiplied by the BLAS that torch ships,
// and finished while it is in cache. 16-bit activations are multiplied in float32.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../projection_checks.h"
#include "moments.h"
#include "projection.h"

namespace resnet_fused::cpu {
namespace {

// Planes [first, ...) of constants from rows of a table; zeros without one.
void fill(Block& block, int first, const OptionalTensor& table, std::initializer_list<int> rows) {
  if (!table.has_value()) return;
  const Tensor dense_table = contiguous_table(*table);
  const Table in(dense_table);
  for (const int row : rows) {
    for (int64_t c = 0; c < in.channels(); ++c) block.set_constant(first, c, in.get(row, c));
    ++first;
  }
}

void fill_bias(Block& block, const OptionalTensor& bias, ScalarType wide) {
  if (!bias.has_value()) return;
  const Tensor converted = torch::stable::contiguous(torch::stable::to(*bias, wide));
  const bool is_double = wide == ScalarType::Double;
  for (int64_t c = 0; c < bias->numel(); ++c) {
    const void* data = converted.const_data_ptr();
    block.set_constant(kBias, c, is_double ? static_cast<const double*>(data)[c] : static_cast<const float*>(data)[c]);
  }
}

// Coefficients of dy = a * g + b * (y - mean) + c, or of dy = a * g.
int fill_gradient(Block& block, const OptionalTensor& moments, const OptionalTensor& sums) {
  if (!moments.has_value()) return kPlain;
  const Tensor dense_moments = contiguous_table(*moments);
  const Table m(dense_moments);
  for (int64_t k = 0; k < m.channels(); ++k) block.set_constant(kFactorG, k, m.get(2, k));
  if (!sums.has_value()) return kScaled;
  const Tensor dense_sums = contiguous_table(*sums);
  const Table s(dense_sums);
  for (int64_t k = 0; k < m.channels(); ++k) {
    const double scale = m.get(2, k), inverse = m.get(4, k);
    block.set_constant(kFactorY, k, -scale * m.get(1, k) * s.get(1, k) * inverse);
    block.set_constant(kMeanY, k, m.get(0, k));
    block.set_constant(kConstant, k, -scale * s.get(0, k) * inverse);
  }
  return kBatchStatistics;
}

// Count, mean and M2 of `rows` rows of `out`, at most 128, as tile `tile` of partials.
void tile_statistics(const Block& block, const char* out, int64_t rows, int64_t tile, const Tensor& partials) {
  const int64_t K = block.args.channels;
  std::vector<double> acc(3 * block.args.plane);
  BnArgs args;
  args.y = out;
  args.width = K;
  args.plane = block.args.plane;
  block.isa.stats[block.dtype](args, 0, rows * K, acc.data());
  const Table table(partials);
  for (int64_t c = 0; c < K; ++c) {
    double mean = acc[c] + acc[2 * block.args.plane + c], m2 = acc[block.args.plane + c];
    if (!std::isfinite(mean)) plain_moments(block.dtype, out + c * block.element, rows, K, &mean, &m2);
    table.set(3 * tile, c, static_cast<double>(rows));
    table.set(3 * tile + 1, c, mean);
    table.set(3 * tile + 2, c, m2);
  }
}

std::tuple<Tensor, Tensor> projection_fwd(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& bias,
                                          std::vector<int64_t> stride, bool stats, const OptionalTensor& moments,
                                          const OptionalTensor& add_any, const OptionalTensor& add_moments, bool relu,
                                          bool) {
  const ProjectionChecker check("projection_fwd");
  const auto s =
      check_projection_fwd(check, x_any, weight_any, bias, stride, stats, moments, add_any, add_moments, relu);
  const ScalarType dtype = x_any.scalar_type(), wide = opmath(dtype);
  const Tensor x = dense(x_any);
  const OptionalTensor add = dense(add_any);
  const Tensor out = empty_channels_last(s.N, s.K, s.P, s.Q, dtype);
  const int64_t tiles = stats ? s.tiles() : 0;
  const Tensor partials = torch::stable::new_zeros(out, {tiles, 3, s.K}, wide);
  const Weight weight(dense(weight_any), s);

  Block source(x, s, s.C, 0), target(out, s, s.K, kEpiloguePlanes);
  fill_bias(target, bias, wide);
  fill(target, kOwnMean, moments, {0, 2, 3});
  fill(target, kAddMean, add_moments, {0, 2, 3});
  target.args.has_affine = moments.has_value();
  target.args.has_add_affine = add_moments.has_value();
  target.args.add = data_of(add);
  target.args.relu = relu;
  const bool finished = target.is_wide && !bias.has_value() && !moments.has_value() && !add.has_value() && !relu;
  for_blocks(s, [&](int64_t begin, int64_t end, Scratch& scratch) {
    void* rows = source.is_wide && s.is_dense() ? source.row(x, begin) : scratch.get(0, end - begin, s.C);
    if (!(source.is_wide && s.is_dense())) source.run(source.isa.projection_gather, x, rows, begin, end);
    void* product = target.is_wide ? target.row(out, begin) : scratch.get(1, end - begin, s.K);
    multiply(matrix(product, end - begin, s.K, wide), matrix(rows, end - begin, s.C, wide), weight.transposed());
    if (!finished) target.run(target.isa.projection_finish, out, product, begin, end);
    for (int64_t row = begin; row < end && stats; row += kTileRows) {
      const int64_t count = std::min(kTileRows, end - row);
      tile_statistics(target, static_cast<const char*>(target.row(out, row)), count, row / kTileRows, partials);
    }
  });
  return {out, partials};
}

Tensor projection_dgrad(const Tensor& g_any, const OptionalTensor& y_any, const Tensor& weight_any,
                        const OptionalTensor& moments, const OptionalTensor& sums, std::vector<int64_t> size,
                        std::vector<int64_t> stride, const OptionalTensor& add_any, bool) {
  const ProjectionChecker check("projection_dgrad");
  const auto s = check_projection_dgrad(check, g_any, y_any, weight_any, moments, sums, size, stride, add_any);
  const ScalarType wide = opmath(g_any.scalar_type());
  const Tensor g = dense(g_any);
  const OptionalTensor y = sums.has_value() ? dense(y_any) : OptionalTensor(), add = dense(add_any);
  const Tensor dx = empty_channels_last(s.N, s.C, s.H, s.W, g.scalar_type());
  const Weight weight(dense(weight_any), s);

  Block source(g, s, s.K, kProloguePlanes), target(dx, s, s.C, 0);
  source.args.y = data_of(y);
  source.args.prologue = fill_gradient(source, moments, sums);
  target.args.add = data_of(add);
  const bool given = source.is_wide && source.args.prologue == kPlain;
  const bool in_place = target.is_wide && s.is_dense();
  for_blocks(s, [&](int64_t begin, int64_t end, Scratch& scratch) {
    void* dy = given ? source.row(g, begin) : scratch.get(0, end - begin, s.K);
    if (!given) source.run(source.isa.projection_gradient, g, dy, begin, end);
    void* product = in_place ? target.row(dx, begin) : scratch.get(1, end - begin, s.C);
    multiply(matrix(product, end - begin, s.C, wide), matrix(dy, end - begin, s.K, wide), weight.plain());
    if (!in_place || add.has_value()) target.run(target.isa.projection_scatter, dx, product, begin, end);
  });
  return dx;
}

std::tuple<Tensor, Tensor> projection_wgrad(const Tensor& g_any, const OptionalTensor& y_any, const Tensor& x_any,
                                            const OptionalTensor& moments, const OptionalTensor& sums,
                                            std::vector<int64_t> stride, ScalarType dtype, bool bias, bool) {
  const ProjectionChecker check("projection_wgrad");
  const auto s = check_projection_wgrad(check, g_any, y_any, x_any, moments, sums, stride, dtype);
  const ScalarType wide = opmath(x_any.scalar_type());
  const Tensor g = dense(g_any), x = dense(x_any);
  const OptionalTensor y = sums.has_value() ? dense(y_any) : OptionalTensor();

  Block left(g, s, s.K, kProloguePlanes), right(x, s, s.C, 0);
  left.args.y = data_of(y);
  left.args.prologue = fill_gradient(left, moments, sums);
  const bool given = left.is_wide && left.args.prologue == kPlain && !bias;
  const bool in_place = right.is_wide && s.is_dense();
  Parts parts(s, wide, bias ? left.args.plane : 0);
  parts.for_blocks([&](const Tensor& dw, double* acc, bool first, int64_t begin, int64_t end, Scratch& scratch) {
    void* dy = given ? left.row(g, begin) : scratch.get(0, end - begin, s.K);
    if (!given) left.run(left.isa.projection_gradient, g, dy, begin, end, acc);
    void* rows = in_place ? right.row(x, begin) : scratch.get(1, end - begin, s.C);
    if (!in_place) right.run(right.isa.projection_gather, x, rows, begin, end);
    multiply(dw, transposed(dy, end - begin, s.K, wide), matrix(rows, end - begin, s.C, wide), !first);
  });
  return {parts.weight(dtype), parts.bias_sums(bias)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("projection_fwd", TORCH_BOX(&projection_fwd));
  m.impl("projection_dgrad", TORCH_BOX(&projection_dgrad));
  m.impl("projection_wgrad", TORCH_BOX(&projection_wgrad));
}

} // namespace resnet_fused::cpu

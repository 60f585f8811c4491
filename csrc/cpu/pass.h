// One pass of a batch norm kernel over an activation: static parts, one set of accumulators each.
#pragma once

#include "host.h"

namespace resnet_fused::cpu {

class Pass {
 public:
  Pass(const Tensor& y, int accumulators)
      : isa(kernels()),
        dtype(dtype_of(y)),
        tiling(y, isa),
        constants(tiling, dtype == kFloat64),
        parts_(parts_of(tiling.whole_rows(), tiling.total)),
        accumulators_(accumulators),
        acc_(parts_ * accumulators * tiling.plane) {
    args.width = tiling.width;
    args.plane = tiling.plane;
    args.constants = constants.data();
    args.y = y.const_data_ptr();
  }

  void run(const BnKernel* kernel) {
    const BnKernel fn = kernel[dtype];
    for_each([&](int64_t part, int64_t begin, int64_t end) { fn(args, begin, end, acc(part, 0)); });
  }

  // Calls run(part, begin, end) with a range of elements of whole rows; the last one takes the rest.
  template <class Run>
  void for_each(const Run& run) {
    for_parts(parts_, tiling.whole_rows(), [&](int64_t part, int64_t begin, int64_t end) {
      run(part, begin * tiling.width, part + 1 == parts_ ? tiling.total : end * tiling.width);
    });
  }

  // Sum of accumulator `which` over the parts and over the columns of a channel, in a fixed order.
  double channel_sum(int which, int64_t channel) {
    double sum = 0;
    for (int64_t part = 0; part < parts_; ++part) {
      for (int64_t j = channel; j < tiling.width; j += tiling.channels) sum += acc(part, which)[j];
    }
    return sum;
  }

  // Chan's merge of the (mean - origin, M2, origin) of the parts and columns of a channel, in a fixed order.
  void channel_moments(int64_t channel, double* mean, double* m2) {
    const int64_t rows = tiling.whole_rows(), rest = tiling.total % tiling.width;
    const double origin = acc(0, 2)[channel];
    double count = 0;
    *mean = *m2 = 0;
    for (int64_t part = 0; part < parts_; ++part) {
      const int64_t own = rows * (part + 1) / parts_ - rows * part / parts_;
      for (int64_t j = channel; j < tiling.width; j += tiling.channels) {
        const double n = static_cast<double>(own + (part + 1 == parts_ && j < rest));
        if (n == 0) continue;
        const double delta = acc(part, 0)[j] + (acc(part, 2)[j] - origin) - *mean, share = n / (count + n);
        *mean += delta * share;
        *m2 += acc(part, 1)[j] + delta * (delta * (count * share));
        count += n;
      }
    }
    *mean += origin;
  }

  const Kernels& isa;
  const DType dtype;
  const Tiling tiling;
  Constants constants;
  BnArgs args;

 private:
  double* acc(int64_t part, int which) { return acc_.data() + (part * accumulators_ + which) * tiling.plane; }

  int64_t parts_;
  int64_t accumulators_;
  std::vector<double> acc_;
};

} // namespace resnet_fused::cpu

// Runs one launch on the emulated device: driver CASE OUTPUTS. CASE holds int64 fields in the order of Field,
// the number of tensors, then for each tensor: its bytes, the bytes it lies beyond an aligned address, 1 where
// data follows (else it is an output, filled with 0xFF), and the data. A tensor of 0 bytes is a null pointer.
// OUTPUTS gets the outputs' bytes, one after another. Without arguments it prints the shared memory of each kernel;
// driver plan N C H W K P Q STRIDE_H STRIDE_W BYTES READS_Y MULTIPROCESSORS SHARED_BYTES
// prints the plan's choices.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../csrc/cuda/launch.h"
#include "device_shim.h"

namespace {

enum Field {
  kOp, kSeed, kN, kC, kH, kW, kK, kP, kQ, kStrideH, kStrideW, kBlockColumns, kElementBytes,
  kPrologue, kSplits, kRelu, kFloatWeights, kFields
};

struct Blob {
  char* data = nullptr;
  int64_t bytes = 0;
  bool is_output = false;
};

FILE* open_file(const char* path, const char* mode) {
  FILE* file = std::fopen(path, mode);
  if (file == nullptr) std::exit(71);
  return file;
}

void read_exactly(FILE* file, void* target, size_t bytes) {
  if (bytes > 0 && std::fread(target, 1, bytes, file) != bytes) std::exit(72);
}

int64_t read_integer(FILE* file) {
  int64_t value = 0;
  read_exactly(file, &value, sizeof value);
  return value;
}

// Each tensor in an allocation of its own that ends where the tensor does, for AddressSanitizer to guard.
Blob read_blob(FILE* file) {
  Blob blob;
  blob.bytes = read_integer(file);
  const int64_t beyond = read_integer(file);
  blob.is_output = read_integer(file) == 0;
  if (blob.bytes == 0) return blob;
  blob.data = static_cast<char*>(std::malloc(blob.bytes + beyond)) + beyond;
  if (blob.is_output) {
    std::memset(blob.data, 0xff, blob.bytes);
  } else {
    read_exactly(file, blob.data, blob.bytes);
  }
  return blob;
}

int launch(const int64_t* f, const std::vector<Blob>& t) {
  using namespace resnet_fused::cuda;
  const Geometry shape{f[kN] * f[kP] * f[kQ],        static_cast<int>(f[kC]), static_cast<int>(f[kK]),
                       static_cast<int>(f[kH]),      static_cast<int>(f[kW]), static_cast<int>(f[kP]),
                       static_cast<int>(f[kQ]),      static_cast<int>(f[kStrideH]), static_cast<int>(f[kStrideW])};
  const int bytes = static_cast<int>(f[kElementBytes]), columns = static_cast<int>(f[kBlockColumns]);
  const auto whole = [&](int i, int64_t extent) {
    return t[i].data == nullptr || is_whole_chunks(t[i].data, extent, bytes);
  };
  const auto floats = [&](int i) { return reinterpret_cast<float*>(t[i].data); };
  const int limit = device_shim::kSharedLimit;
  const Launchers& own = RESNET_FUSED_MATH::launchers();
  if (f[kOp] == kFwd) {
    const bool aligned = whole(3, shape.K) && whole(6, shape.K);
    return own.fwd({shape, t[0].data, t[1].data, floats(2), t[3].data, floats(4), floats(5), t[6].data, floats(7),
                    f[kRelu] != 0, whole(0, shape.C), whole(1, shape.C), aligned},
                   columns, limit, nullptr);
  }
  if (f[kOp] == kDgrad) {
    return own.dgrad({shape, t[0].data, t[1].data, t[2].data, floats(3), floats(4), t[5].data, t[6].data,
                      static_cast<int>(f[kPrologue]), whole(0, shape.K) && whole(1, shape.K), whole(2, shape.C),
                      whole(5, shape.C) && whole(6, shape.C)},
                     columns, limit, nullptr);
  }
  const int target_bytes = f[kFloatWeights] != 0 ? 4 : bytes;
  return own.wgrad({shape, t[0].data, t[1].data, t[2].data, floats(3), floats(4), floats(5), floats(6), t[7].data,
                    floats(8), static_cast<int>(f[kPrologue]), static_cast<int>(f[kSplits]), f[kFloatWeights] != 0,
                    whole(0, shape.K) && whole(1, shape.K), whole(2, shape.C),
                    is_whole_chunks(t[7].data, shape.C, target_bytes)},
                   columns, limit, nullptr);
}

} // namespace

int print_shared_bytes() {
  using namespace resnet_fused::cuda;
  for (const Operation operation : {kFwd, kDgrad, kWgrad}) {
    for (const int columns : {64, 128}) {
      const int bytes = RESNET_FUSED_MATH::launchers().shared_bytes(operation, columns, device_shim::kSharedLimit);
      std::printf("%d %d %d\n", operation, columns, bytes);
    }
  }
  return 0;
}

int print_plan(char** text) {
  using namespace resnet_fused::cuda;
  int64_t v[13];
  for (int i = 0; i < 13; ++i) v[i] = std::atoll(text[i]);
  const auto at = [&](int i) { return static_cast<int>(v[i]); };
  const Geometry shape{v[0] * v[5] * v[6], at(1), at(4), at(2), at(3), at(5), at(6), at(7), at(8)};
  const int64_t row_tiles = tiles_of(shape.rows, 128);
  const Device device{at(11), at(12)};
  const WgradPlan wgrad = choose_wgrad_plan(shape, at(9), v[10] != 0, device);
  std::printf("%d %d %d %d\n", choose_block_columns(row_tiles, shape.K, device),
              choose_block_columns(row_tiles, shape.C, device), wgrad.block_columns, wgrad.splits);
  return 0;
}

int main(int count, char** arguments) {
  if (count == 15 && std::strcmp(arguments[1], "plan") == 0) return print_plan(arguments + 2);
  if (count == 1) return print_shared_bytes();
  FILE* file = open_file(arguments[1], "rb");
  int64_t fields[kFields];
  read_exactly(file, fields, sizeof fields);
  std::vector<Blob> tensors(read_integer(file));
  for (Blob& blob : tensors) blob = read_blob(file);
  std::fclose(file);
  device_shim::seed = static_cast<uint64_t>(fields[kSeed]);
  const int error = launch(fields, tensors);
  if (error != 0) {
    std::fprintf(stderr, "device shim: the launch failed with error %d\n", error);
    return 73;
  }
  FILE* outputs = open_file(arguments[2], "wb");
  for (const Blob& blob : tensors) {
    if (blob.is_output && blob.bytes > 0) std::fwrite(blob.data, 1, blob.bytes, outputs);
  }
  std::fclose(outputs);
  return 0;
}

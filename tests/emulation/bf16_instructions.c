// AVX512-BF16 and AMX on a machine that has AVX-512 but not these: preloaded, it computes what the instructions would
// where they are illegal. So the library's kernels run as they were compiled.
//
//   vdpbf16ps   zmm, zmm, zmm or memory, with or without a broadcast; no masks
//   ldtilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbf16ps
//
// Sums are in the order of Intel's description (Software Developer's Manual, volume 2), denormals are zero.
#define _GNU_SOURCE
#include <cpuid.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

typedef struct {
  int rows, bytes;
  uint8_t data[16][64];
} Tile;

static __thread Tile tiles[8];
static struct {
  uint32_t avx, upper, high; // offsets in the saved state: bits 128 to 255, 256 to 511, and registers 16 to 31
} at;

static float flushed(float v) { return fpclassify(v) == FP_SUBNORMAL ? copysignf(0, v) : v; }

static float widened(const uint8_t* bf16) {
  const uint32_t bits = (uint32_t)(bf16[0] | bf16[1] << 8) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return flushed(value);
}

static float dot(float sum, const uint8_t* a, const uint8_t* b) {
  sum = flushed(fmaf(widened(a + 2), widened(b + 2), flushed(sum)));
  return flushed(fmaf(widened(a), widened(b), sum));
}

// ---- registers of the interrupted thread ----

static uint8_t* state_of(ucontext_t* context) {
  uint8_t* state = (uint8_t*)context->uc_mcontext.fpregs;
  uint64_t present;
  memcpy(&present, state + 512, 8);
  if (!(present & 2)) memset(state + 160, 0, 256);
  if (!(present & 4)) memset(state + at.avx, 0, 256);
  if (!(present & 64)) memset(state + at.upper, 0, 512);
  if (!(present & 128)) memset(state + at.high, 0, 1024);
  present |= 2 | 4 | 64 | 128;
  memcpy(state + 512, &present, 8);
  return state;
}

static void zmm(uint8_t* state, int i, uint8_t* value, int store) {
  uint8_t* parts[] = {state + 160 + 16 * i, state + at.avx + 16 * i, state + at.upper + 32 * i, 0};
  const int sizes[] = {16, 16, 32};
  if (i >= 16) {
    store ? memcpy(state + at.high + 64 * (i - 16), value, 64) : memcpy(value, state + at.high + 64 * (i - 16), 64);
    return;
  }
  for (int p = 0; p < 3; value += sizes[p++]) {
    store ? memcpy(parts[p], value, sizes[p]) : memcpy(value, parts[p], sizes[p]);
  }
}

static int64_t general(const ucontext_t* context, int i) {
  static const int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[order[i]];
}

// ---- decoding ----

typedef struct {
  int reg, rm, is_memory, has_index;
  int64_t base, index; // of memory; index times its scale
  const uint8_t* end;
} Operand;

// The operand at `code`, its ModRM byte. r, x, b: the prefix' bits that extend it; unit: of an 8-bit displacement.
static Operand decode(const ucontext_t* context, const uint8_t* code, int r, int x, int b, int unit) {
  Operand own = {.reg = (code[0] >> 3 & 7) | r << 3, .rm = (code[0] & 7) | b << 3};
  const int mode = code[0] >> 6, low = code[0] & 7;
  ++code;
  own.is_memory = mode != 3;
  int has_base = 1;
  if (own.is_memory && low == 4) {
    const int index = (*code >> 3 & 7) | x << 3, base = (*code & 7) | b << 3;
    own.has_index = index != 4;
    if (own.has_index) own.index = general(context, index) << (*code >> 6);
    has_base = !((*code & 7) == 5 && mode == 0);
    if (has_base) own.base = general(context, base);
    ++code;
  } else if (own.is_memory) {
    has_base = !(low == 5 && mode == 0);
    if (has_base) own.base = general(context, own.rm);
  }
  const int is_relative = own.is_memory && low == 5 && mode == 0;
  if (mode == 1) own.base += (int8_t)*code++ * unit;
  if (mode == 2 || (own.is_memory && !has_base)) {
    int32_t displacement;
    memcpy(&displacement, code, 4);
    own.base += displacement;
    code += 4;
  }
  if (is_relative) own.base += (int64_t)code;
  own.end = code;
  return own;
}

// vdpbf16ps: EVEX.512.F3.0F38.W0 52
static const uint8_t* pairs(ucontext_t* context, const uint8_t* code) {
  const int is_unmasked = (code[3] & 0x67) == 0x40;
  if (code[0] != 0x62 || code[4] != 0x52 || (code[1] & 7) != 2 || (code[2] & 0x83) != 2 || !is_unmasked) return 0;
  const int is_broadcast = code[3] >> 4 & 1;
  const int r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20), high = !(code[1] & 0x10);
  const Operand own = decode(context, code + 5, r, x, b, is_broadcast ? 4 : 64);
  uint8_t* state = state_of(context);
  uint8_t first[64], second[64], sums[64];
  zmm(state, (~(code[2] >> 3) & 15) | !(code[3] & 8) << 4, first, 0);
  zmm(state, own.reg | high << 4, sums, 0);
  if (!own.is_memory) zmm(state, own.rm | x << 4, second, 0);
  for (int i = 0; own.is_memory && i < 64; i += 4) {
    memcpy(second + i, (const uint8_t*)(own.base + own.index) + (is_broadcast ? 0 : i), 4);
  }
  for (int i = 0; i < 64; i += 4) {
    float sum;
    memcpy(&sum, sums + i, 4);
    sum = dot(sum, first + i, second + i);
    memcpy(sums + i, &sum, 4);
  }
  zmm(state, own.reg | high << 4, sums, 1);
  return own.end;
}

static void configure(const uint8_t* config) {
  for (int t = 0; t < 8; ++t) {
    uint16_t bytes = 0;
    if (config != 0) memcpy(&bytes, config + 16 + 2 * t, 2);
    tiles[t] = (Tile){.rows = config != 0 ? config[48 + t] : 0, .bytes = bytes};
  }
}

static void multiply(Tile* sums, const Tile* left, const Tile* right) {
  for (int row = 0; row < left->rows; ++row) {
    for (int column = 0; column < right->bytes / 4; ++column) {
      float sum;
      memcpy(&sum, sums->data[row] + 4 * column, 4);
      for (int pair = 0; pair < left->bytes / 4; ++pair) {
        sum = dot(sum, left->data[row] + 4 * pair, right->data[pair] + 4 * column);
      }
      memcpy(sums->data[row] + 4 * column, &sum, 4);
    }
  }
}

static int is_wrong(const Tile* sums, const Tile* left, const Tile* right) {
  return sums->rows != left->rows || sums->bytes != right->bytes || left->bytes / 4 != right->rows || sums->rows == 0;
}

// VEX.128.0F38.W0 49, 4B and 5C
static const uint8_t* tile(ucontext_t* context, const uint8_t* code) {
  if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x84) != 0) return 0;
  const int prefix = code[2] & 3, opcode = code[3];
  const Operand own =
      decode(context, code + 4, !(code[1] & 0x80), !(code[1] & 0x40), !(code[1] & 0x20), 1);
  if (opcode == 0x49 && prefix == 0) {
    configure(own.is_memory ? (const uint8_t*)(own.base + own.index) : 0);
  } else if (opcode == 0x49 && prefix == 3 && !own.is_memory) {
    memset(tiles[own.reg].data, 0, sizeof(tiles[0].data));
  } else if (opcode == 0x4b && prefix >= 2 && own.is_memory && own.has_index && tiles[own.reg].rows > 0) {
    Tile* t = tiles + own.reg;
    for (int row = 0; row < t->rows; ++row) {
      uint8_t* memory = (uint8_t*)(own.base + row * own.index);
      prefix == 3 ? memcpy(t->data[row], memory, t->bytes) : memcpy(memory, t->data[row], t->bytes);
    }
  } else if (opcode == 0x5c && prefix == 2 && !own.is_memory) {
    Tile *sums = tiles + own.reg, *left = tiles + own.rm, *right = tiles + (~(code[2] >> 3) & 7);
    if (is_wrong(sums, left, right)) return 0;
    multiply(sums, left, right);
  } else {
    return 0;
  }
  return own.end;
}

static void on_illegal(int signal_number, siginfo_t* info, void* data) {
  (void)info;
  ucontext_t* context = data;
  const uint8_t* code = (const uint8_t*)context->uc_mcontext.gregs[REG_RIP];
  const uint8_t* next = pairs(context, code);
  if (next == 0) next = tile(context, code);
  if (next == 0) {
    static const char message[] = "bf16_instructions: an instruction that is not emulated\n";
    (void)!write(2, message, sizeof(message) - 1);
    signal(signal_number, SIG_DFL);
    return;
  }
  context->uc_mcontext.gregs[REG_RIP] = (greg_t)next;
}

__attribute__((constructor)) static void install(void) {
  uint32_t size, unused;
  __cpuid_count(13, 2, size, at.avx, unused, unused);
  __cpuid_count(13, 6, size, at.upper, unused, unused);
  __cpuid_count(13, 7, size, at.high, unused, unused);
  struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
  sigaction(SIGILL, &action, 0);
}

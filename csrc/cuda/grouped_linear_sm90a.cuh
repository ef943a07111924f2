// grouped_linear on sm_90a: TMA, mbarriers and wgmma. The host's side is backends/cuda/_wgmma.py.
#pragma once

#include "grouped_linear_outputs.cuh"
#include "hopper.cuh"
#include "kernel.cuh"
#include "schedule.cuh"

namespace mixpert {

template <typename T_>
struct WgmmaArgs {
  using T = T_;
#define FIELDS(FIELD)                                                          \
  FIELD(TensorMap, x)        /* (B, T, K), or packed rows (1, R, K) */         \
  FIELD(TensorMap, w0)       /* (E, N, K) */                                   \
  FIELD(TensorMap, w1)       /* (E, N, K), never read where there is none */   \
  FIELD(TensorMap, w2)                                                         \
  FIELD(const T*, b0)        /* (E, N) or null, the bias of w0 */              \
  FIELD(const T*, b1)                                                          \
  FIELD(const T*, b2)                                                          \
  FIELD(const T*, scale)     /* (E, width) or null; width = weights * N */     \
  FIELD(const T*, residual)  /* (B, T, width) or null, laid out like y */      \
  FIELD(T*, y)               /* (B, T, width) */                               \
  FIELD(T*, pre)             /* (B, T, width) or null, laid out like y */      \
  FIELD(const int*, expert)  /* (B,) */                                        \
  FIELD(const int*, order)   /* (B,) */                                        \
  FIELD(const int*, cu_seqlens)  /* (B + 1,) for packed rows, or null */       \
  FIELD(long long, stride_yb)                                                  \
  FIELD(long long, stride_yt)                                                  \
  FIELD(int, batch)                                                            \
  FIELD(int, tokens)         /* T, or R */                                     \
  FIELD(int, columns)        /* N */                                           \
  FIELD(int, depth)          /* K */                                           \
  FIELD(int, weights)                                                          \
  FIELD(int, activation)                                                       \
  FIELD(int, vectors)        /* outputs, bias and scale are aligned vectors */
  MIXPERT_FIELDS(FIELDS)
#undef FIELDS
};

// 128 x 128 blocks: 128 divides N = 1152, 3456 and 3584, and wastes 1.1 % at 4304. A consumer has one whole block, its
// accumulators take 128 registers a thread. Beside the strips of eight warps 227 KB hold five stages.
struct WgmmaConfig {
  static constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 64;
  static constexpr int kStages = 5;
  static constexpr int kConsumers = 2;  // warpgroups that multiply, after one that loads
  static constexpr int kThreads = (1 + kConsumers) * hopper::kWarpgroup;
  static constexpr int kMinBlocks = 1;
  // Of 65536 registers: (128 * 24 + 256 * 240) are what 384 threads with 168 each were launched with.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static constexpr int kOperandBytes = kBlockM * kBlockK * 2;
  static constexpr int kStageBytes = 2 * kOperandBytes;
  using Strip = mixpert::Strip<64>;  // a warp's
  static constexpr int kStripsAt = kStages * kStageBytes;
  static constexpr int kFullAt = kStripsAt + kConsumers * hopper::kWarpgroup / 32 * Strip::kBytes;
  static constexpr int kEmptyAt = kFullAt + 8 * kStages;
  static constexpr int kTurnAt = kEmptyAt + 8 * kStages;
  static constexpr int kSharedBytes = kTurnAt + 8 * kConsumers + hopper::kSwizzleAlign;  // the start is moved up to it
  static_assert(kBlockM == kBlockN && kBlockK * 2 == 128 && kSharedBytes <= 227 * 1024);

  static constexpr void constants(Facts& facts) {
    facts.constant("block_m", kBlockM);
    facts.constant("block_n", kBlockN);
    facts.constant("block_k", kBlockK);
  }
};

// A stage of the ring and the parity of the round, for one that passes them in order.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void skip(int stages) {
    parity ^= (stage + stages) / kStages & 1;
    stage = (stage + stages) % kStages;
  }
};

template <class Config, class Args>
struct Wgmma {
  using T = typename Args::T;

  const Args& args;
  uint32_t shared;  // where the ring begins
  int blocks;       // of the output
  int steps;        // of kBlockK along the depth

  __device__ Wgmma(const Args& args_, uint32_t shared_)
      : args(args_),
        shared(ceil_div(shared_, hopper::kSwizzleAlign) * hopper::kSwizzleAlign),
        blocks(count_row_blocks<Config::kBlockM>(args_) * args_.weights * ceil_div(args_.columns, Config::kBlockN)),
        steps(ceil_div(args_.depth, Config::kBlockK)) {}

  __device__ __forceinline__ uint32_t operands(int stage) const { return shared + stage * Config::kStageBytes; }
  __device__ __forceinline__ uint32_t full(int stage) const { return shared + Config::kFullAt + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return shared + Config::kEmptyAt + 8 * stage; }
  __device__ __forceinline__ uint32_t turn(int consumer) const { return shared + Config::kTurnAt + 8 * consumer; }

  __device__ void init() const {
    for (const TensorMap* map : {&args.x, &args.w0, &args.w1, &args.w2}) hopper::prefetch(*map);
    constexpr int kWarps = hopper::kWarpgroup / 32;
    for (int stage = 0; stage < Config::kStages; ++stage) {
      hopper::init(full(stage), 1);  // the producer, with the bytes it expects
      hopper::init(empty(stage), kWarps);
    }
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) hopper::init(turn(consumer), kWarps);
    hopper::fence_init();
  }

  __device__ __forceinline__ Place place_of(int block) const {
    return locate(block, count_row_blocks<Config::kBlockM>(args),
                  args.weights * ceil_div(args.columns, Config::kBlockN));
  }
  __device__ __forceinline__ RowBlock rows_at(const Place& place) const {
    return row_block<Config::kBlockM>(args, place.row, [&](int i) { return args.order[i]; });
  }

  // Where a block lies.
  struct Block {
    RowBlock rows;
    int expert, weight, first_n;
  };
  __device__ __forceinline__ Block find(int block) const {
    const int weight_blocks = ceil_div(args.columns, Config::kBlockN);
    const Place place = place_of(block);
    const RowBlock rows = rows_at(place);
    return {rows, args.expert[rows.tile], place.column / weight_blocks,
            place.column % weight_blocks * Config::kBlockN};
  }

  // This thread block's first block from `block` on, or the one that comes `others` after it; of packed rows those that
  // have rows are counted.
  __device__ __forceinline__ int seek(int block, int others) const {
    if (!args.cu_seqlens) return block + others * gridDim.x;
    for (; block < blocks; block += gridDim.x) {
      if (rows_at(place_of(block)).has_rows() && others-- == 0) break;
    }
    return block;
  }

  // One thread. It runs ahead of the consumers by up to kStages, past the end of a block too.
  __device__ void produce() const {
    Ring<Config::kStages> ring;
    for (int block = seek(blockIdx.x, 0); block < blocks; block = seek(block + gridDim.x, 0)) {
      const Block at = find(block);
      // The box of packed rows may hold some of the next tile, which are multiplied and not stored.
      const int tile = args.cu_seqlens ? 0 : at.rows.tile;
      const int row = at.rows.first_row + (args.cu_seqlens ? at.rows.first : 0);
      const TensorMap* w = pick(at.weight, &args.w0, &args.w1, &args.w2);
      for (int step = 0; step < steps; ++step, ring.next()) {
        const int k = step * Config::kBlockK;
        hopper::wait(empty(ring.stage), ring.parity ^ 1);
        hopper::arrive_and_expect(full(ring.stage), Config::kStageBytes);
        hopper::load_box(operands(ring.stage), args.x, tile, row, k, full(ring.stage));
        hopper::load_box(operands(ring.stage) + Config::kOperandBytes, *w, at.expert, at.first_n, k, full(ring.stage));
      }
    }
  }

  // A warpgroup. Consumers take the blocks in turn, and each waits until the other has issued its products: while one
  // finishes its block, the other multiplies. Nor could it look at the ring before: it is rounds behind there, and a
  // parity tells a round from the next one only.
  __device__ void consume(int me) const {
    Ring<Config::kStages> ring;
    ring.skip(me * steps);
    int parity = me ^ 1;  // the first consumer's first turn has come
    const int others = Config::kConsumers - 1;
    for (int block = seek(blockIdx.x, me); block < blocks; block = seek(block + gridDim.x, others)) {
      const Block at = find(block);
      hopper::wait(turn(me), parity);
      parity ^= 1;
      hopper::Accumulators acc[2];  // rows 0 to 63, 64 to 127
      multiply(acc, ring, me);
      ring.skip(steps);
      finish(acc, at);
    }
  }

  // The product of a block. A stage is given back when the products of the next one have been issued, so that there is
  // always something to multiply.
  __device__ __forceinline__ void multiply(hopper::Accumulators (&acc)[2], Ring<Config::kStages>& ring, int me) const {
    issue(acc, ring, false);
    for (int step = 1; step < steps; ++step) {
      const uint32_t left = empty(ring.stage);
      ring.next();
      issue(acc, ring, true);
      hopper::wait_groups<1>();
      if (hopper::elected()) hopper::arrive(left);
    }
    if (hopper::elected()) hopper::arrive(turn(me ^ 1));
    hopper::wait_groups<0>();
    for (auto& half : acc) half.pin();
    if (hopper::elected()) hopper::arrive(empty(ring.stage));
    ring.next();
  }

  // acc = or += the product of one stage, k ascending in steps of 16.
  __device__ __forceinline__ void issue(hopper::Accumulators (&acc)[2], const Ring<Config::kStages>& ring,
                                        bool add) const {
    using hopper::kUnit;
    hopper::wait(full(ring.stage), ring.parity);
    const uint32_t a = hopper::descriptor(operands(ring.stage));
    const uint32_t b = hopper::descriptor(operands(ring.stage) + Config::kOperandBytes);
    hopper::fence_operands();
#pragma unroll
    for (int k = 0; k < Config::kBlockK / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        hopper::multiply<T>(acc[half], a + (half * Config::kOperandBytes / 2 + k * 32) / kUnit, b + k * 32 / kUnit,
                            add || k > 0);
      }
    }
    hopper::commit();
  }

  // By strips: 64 columns of the 16 rows a warp has of either half.
  __device__ __forceinline__ void finish(const hopper::Accumulators (&acc)[2], const Block& at) const {
    using Strip = typename Config::Strip;
    const int warp = hopper::warp_index() - hopper::kWarpgroup / 32;
    unsigned char* strip = dynamic_shared() + (shared - shared_address(dynamic_shared())) + Config::kStripsAt +
                           warp * Strip::kBytes;
    const Outputs<T> out = outputs_of<T>(args, at.weight, at.rows.tile, at.expert, at.rows.first_row, at.first_n);
#pragma unroll 1
    for (int column = 0; column < Config::kBlockN; column += Strip::kColumns) {
      const StripWriter<T, Strip> writer(out, column);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (i == half) hopper::store_strip<Strip>(acc[i], column, strip);
        }
        __syncwarp();
        writer.write(strip, 64 * half + warp % 4 * Strip::kRows);
        __syncwarp();
      }
    }
  }
};

// z[b, t, i N + n] = sum_k x[b, t, k] w_i[e, n, k] + bias_i[e, n]     with e = expert[b], i the weight
// y[b, t, c] = scale[e, c] act(z[b, t, c]) + residual[b, t, c]        with c in [0, width), width = weights * N
//
// Blocks of the output are 128 tokens of one tile x 128 columns of one weight, in the order of `locate`; of packed rows
// there are R / 128 + B row blocks (packed.cuh). The grid fills the chip once; thread block p computes the blocks p,
// p + grid, ... Its first warpgroup loads, by TMA, which writes zeros past T, N and K; the two others multiply.
template <class Config, class Args>
__device__ void grouped_linear_wgmma(const Args& args) {
  const Wgmma<Config, Args> self(args, shared_address(dynamic_shared()));
  if (threadIdx.x == 0) self.init();
  __syncthreads();
  const int warp = hopper::warp_index();
  if (warp < hopper::kWarpgroup / 32) {
    hopper::give_registers_back<Config::kProducerRegisters>();
    if (warp == 0 && hopper::elected()) self.produce();
  } else {
    hopper::take_registers<Config::kConsumerRegisters>();
    self.consume(warp / (hopper::kWarpgroup / 32) - 1);
  }
}

}  // namespace mixpert

// The product of two 16-bit operands that lie in whole 16-byte chunks: what is the same in every
// step (addresses, predicates, the turn of a line) is found once, before the loop.
#pragma once

#include "multiply.cuh"

namespace secura {

// Copies a tile, step after step along the depth: each thread COUNT chunks, one in each APART
// lines. Of a tile that has fewer chunks than THREADS, the last threads copy none.
template <class Tile, int THREADS>
class Copier {
  using T = typename Tile::Element;
  static constexpr int APART = THREADS / Tile::CHUNKS, LINE = Tile::CHUNKS * Tile::PER_CHUNK;
  static_assert(APART % 8 == 0, "lines that are turned alike");
  static_assert(Tile::LINES % APART == 0 || (Tile::ALONG_DEPTH && APART > Tile::LINES),
                "each line once; where they are depths, as many steps on as there are");

 public:
  static constexpr int COUNT = std::max(Tile::LINES / APART, 1);

 private:
  const T *first, *source;  // of the step's first chunk, and of the next one
  int64_t apart;
  int offset;      // in the tile
  int lines_left;  // from this thread's first line on
  // Where lines are rows: the depth copied, and up to where each chunk's line goes on; 0 for a line
  // outside. Each is kept in a register: nvcc would form it again at every copy, of two conditions.
  int copied = 0, until[Tile::ALONG_DEPTH ? COUNT : 1];

 public:
  __device__ __forceinline__ Copier(const Operand<T>& from, int row0) {
    const int line = threadIdx.x / Tile::CHUNKS, index = threadIdx.x % Tile::CHUNKS;
    const int place = index * Tile::PER_CHUNK;
    offset = static_cast<int>(Tile(nullptr).chunk(line, index) - Tile(nullptr).data);
    if constexpr (Tile::ALONG_DEPTH) {
      first = from.data + (row0 + line) * from.stride_row + place;
      apart = APART * from.stride_row;
      lines_left = from.rows - row0 - line;
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        until[n] = found_anew(n * APART < lines_left ? from.depth - place : 0);
      }
    } else {
      first = from.data + line * from.stride_depth + row0 + place;
      apart = APART * from.stride_depth;
      lines_left = row0 + place < from.rows ? from.depth - line : 0;
    }
    source = first;
  }

  // Starts the step's chunks `begin` to `end`, called for all of them in turn; zeros outside.
  __device__ __forceinline__ void copy(const Tile& to, int begin, int end) {
    if (APART > Tile::LINES && threadIdx.x >= Tile::LINES * Tile::CHUNKS) {
      return;
    }
#pragma unroll
    for (int n = begin; n < end; ++n) {
      const bool inside = Tile::ALONG_DEPTH ? copied < until[n] : n * APART < lines_left;
      copy_async(to.data + offset + n * APART * LINE, source, inside ? 16 : 0);
      source += apart;
    }
  }

  // All chunks of a step.
  __device__ __forceinline__ void copy_step(const Tile& to) {
    copy(to, 0, COUNT);
    next_step();
  }

  __device__ __forceinline__ void next_step() {
    if constexpr (Tile::ALONG_DEPTH) {
      source = first += Tile::DEPTH;
      copied += Tile::DEPTH;
    } else {  // the last chunk's next line is the next step's first
      lines_left -= Tile::DEPTH;
    }
  }
};

// Reads a warp's fragments of 16 rows and 16 of the depth, PARTS of them below one another. Of A
// the matrices are rows 0-7, rows 8-15, and the same at k + 8; of B the two in the middle change
// places.
template <class Tile, int PARTS, bool OF_A>
class Reader {
  static constexpr int LINE = Tile::CHUNKS * Tile::PER_CHUNK, STEPS = Tile::DEPTH / 16;
  int offset[Tile::ALONG_DEPTH ? STEPS : PARTS];  // the turn of a chunk depends on no more

 public:
  __device__ __forceinline__ explicit Reader(int row0) {
    const int lane = threadIdx.x % 32, low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
    const int rows = OF_A ? middle : high, depths = OF_A ? high : middle;
    const Tile tile(nullptr);
    if constexpr (Tile::ALONG_DEPTH) {
#pragma unroll
      for (int k = 0; k < STEPS; ++k) {
        offset[k] = static_cast<int>(tile.chunk(row0 + low + 8 * rows, 2 * k + depths) - tile.data);
      }
    } else {
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        offset[i] =
            static_cast<int>(tile.chunk(low + 8 * depths, row0 / 8 + 2 * i + rows) - tile.data);
      }
    }
  }

  // The fragments at depth 16 k of the tile.
  __device__ __forceinline__ void read(uint32_t (&out)[PARTS][4], const Tile& tile, int k) const {
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      if constexpr (Tile::ALONG_DEPTH) {
        load_matrices(out[i], tile.data + offset[k] + 16 * i * LINE);
      } else {
        load_matrices_transposed(out[i], tile.data + offset[i] + 16 * k * LINE);
      }
    }
  }
};

// sum += a b^T, in tiles of DEPTH elements, STAGES of them in shared memory.
template <typename T, class Sum, int DEPTH, int STAGES, Along ALONG_A, Along ALONG_B>
class Pipeline {
  using TileA = SharedTile<T, Sum::ROWS, DEPTH, ALONG_A>;
  using TileB = SharedTile<T, Sum::COLUMNS, DEPTH, ALONG_B>;
  using CopierA = Copier<TileA, Sum::THREADS>;
  using CopierB = Copier<TileB, Sum::THREADS>;
  static constexpr int STAGE = TileA::BYTES + TileB::BYTES, STEPS = DEPTH / 16;
  static_assert(sizeof(T) == 2 && STEPS >= 2 && STAGES >= 2, "a step of fragments is read ahead");

  // One of the stages, of which each step takes the next.
  struct Stage {
    unsigned char* memory;
    int at;
    __device__ __forceinline__ TileA a() const { return TileA(memory + at); }
    __device__ __forceinline__ TileB b() const { return TileB(memory + at + TileA::BYTES); }
    __device__ __forceinline__ Stage next() const {
      return {memory, at == BYTES - STAGE ? 0 : at + STAGE};
    }
  };

  // Part `part` of `parts` of a step's copies.
  __device__ __forceinline__ static void copy(CopierA& a, CopierB& b, const Stage& to, int part,
                                              int parts) {
    constexpr int A = CopierA::COUNT, ALL = A + CopierB::COUNT;
    const int begin = ALL * part / parts, end = ALL * (part + 1) / parts;
    a.copy(to.a(), min(begin, A), min(end, A));
    b.copy(to.b(), max(begin, A) - A, max(end, A) - A);
  }

  __device__ __forceinline__ static void next_step(CopierA& a, CopierB& b) {
    commit_copies();
    a.next_step();
    b.next_step();
  }

 public:
  static constexpr int BYTES = STAGES * STAGE;

  // At rows row0... of a and column0... of b. Every thread of the block calls it; on return the
  // shared memory is free again.
  __device__ __forceinline__ static void run(Sum& sum, const Operand<T>& a, int row0,
                                             const Operand<T>& b, int column0,
                                             unsigned char* memory) {
    const int steps = (a.depth + DEPTH - 1) / DEPTH;
    CopierA from_a(a, row0);
    CopierB from_b(b, column0);
    // The stage that is filled is the one that the step before has read.
    Stage read = {memory, 0}, filled = read;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      copy(from_a, from_b, filled, 0, 1);
      next_step(from_a, from_b);
      filled = filled.next();
    }
    wait_copies<STAGES - 2>();
    __syncthreads();
    if constexpr (TENSOR_CORES) {
      const Reader<TileA, Sum::I, true> reader_a(Sum::warp_row());
      const Reader<TileB, Sum::J / 2, false> reader_b(Sum::warp_column());
      uint32_t part_a[2][Sum::I][4], part_b[2][Sum::J / 2][4];
      reader_a.read(part_a[0], read.a(), 0);
      reader_b.read(part_b[0], read.b(), 0);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
          if (k == STEPS - 1) {  // the step's tile is read: the next one must be here
            wait_copies<STAGES - 2>();
            __syncthreads();
            filled = read;
            read = read.next();
          }
          const int next = (k + 1) % STEPS, here = k % 2, there = (k + 1) % 2;
          reader_a.read(part_a[there], read.a(), next);
          reader_b.read(part_b[there], read.b(), next);
          if (k < STEPS - 1) {
            copy(from_a, from_b, filled, k, STEPS - 1);
          }
          if (k == STEPS - 2) {
            next_step(from_a, from_b);
          }
          sum.template multiply_add_all<T>(part_a[here], part_b[here]);
        }
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        copy(from_a, from_b, filled, 0, 1);
        next_step(from_a, from_b);
        sum.add(read.a(), read.b());
        wait_copies<STAGES - 2>();
        __syncthreads();
        filled = read;
        read = read.next();
      }
    }
    wait_copies<0>();
    __syncthreads();
  }
};

}  // namespace secura

// Operands of a product: in global memory with any strides, in shared memory as swizzled tiles.
#pragma once

#include "instructions.cuh"
#include "passes.h"
#include "types.cuh"

namespace secura {

// `rows` x `depth`, to be contracted over depth; element (row, k) at row * stride_row + k *
// stride_depth.
template <typename T>
struct Operand {
  const T* data;
  int64_t stride_row, stride_depth;
  int rows, depth;
};

template <typename T>
__device__ __forceinline__ Operand<T> operand(const Matrix& matrix) {
  return {static_cast<const T*>(matrix.data), matrix.stride_row, matrix.stride_column, matrix.rows,
          matrix.columns};
}

template <typename T>
__device__ __forceinline__ Operand<T> transposed(const Operand<T>& of) {
  return {of.data, of.stride_depth, of.stride_row, of.depth, of.rows};
}

// Rows contiguous, `columns` long.
template <typename T>
__device__ __forceinline__ Operand<T> packed(const void* data, int rows, int columns) {
  return {static_cast<const T*>(data), columns, 1, rows, columns};
}

// Which dimension of an operand is contiguous in shared memory; where it is so in global memory too,
// tiles move in chunks of 16 bytes.
enum class Along { DEPTH, ROWS };

__host__ __device__ __forceinline__ bool is_aligned(const void* data, int64_t stride, int size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0;
}

// Whether every tile of a matrix is whole chunks of 16 bytes along its columns (DEPTH) or rows.
// Such operands have kernels of their own, which read nothing else.
template <typename T>
bool in_chunks(const Matrix& matrix, Along along) {
  constexpr int SIZE = sizeof(T);
  return along == Along::DEPTH
             ? matrix.stride_column == 1 && matrix.columns * SIZE % 16 == 0 &&
                   is_aligned(matrix.data, matrix.stride_row, SIZE)
             : matrix.stride_row == 1 && matrix.rows * SIZE % 16 == 0 &&
                   is_aligned(matrix.data, matrix.stride_column, SIZE);
}
enum class Reads { ANY, CHUNKS };

// ROWS x DEPTH elements in shared memory, in lines along one dimension. The 16-byte chunks of a line
// are turned (XOR) by the line's number, so that the same chunk of 8 lines lies in 8 different
// groups of banks: what ldmatrix reads at once.
template <typename T, int ROWS_, int DEPTH_, Along ALONG>
struct SharedTile {
  using Element = T;
  static constexpr int ROWS = ROWS_, DEPTH = DEPTH_;
  static constexpr bool ALONG_DEPTH = ALONG == Along::DEPTH;
  static constexpr int LINES = ALONG_DEPTH ? ROWS : DEPTH;
  static constexpr int PER_CHUNK = 16 / sizeof(T);
  static constexpr int CHUNKS = (ALONG_DEPTH ? DEPTH : ROWS) / PER_CHUNK;
  static constexpr int BYTES = ROWS * DEPTH * static_cast<int>(sizeof(T));
  static_assert(CHUNKS >= 2 && (CHUNKS & (CHUNKS - 1)) == 0, "lines of a power of two chunks");

  T* data;

  __device__ __forceinline__ explicit SharedTile(unsigned char* memory)
      : data(reinterpret_cast<T*>(memory)) {}

  __device__ __forceinline__ T* chunk(int line, int index) const {
    // 128 bytes are all banks: shorter lines share them, and turn once in as many lines.
    constexpr int SHARING = CHUNKS >= 8 ? 1 : 8 / CHUNKS;
    const int turned = index ^ (line / SHARING % (CHUNKS >= 8 ? 8 : CHUNKS));
    return data + (line * CHUNKS + turned) * PER_CHUNK;
  }

  __device__ __forceinline__ T& at(int row, int k) const {
    const int line = ALONG_DEPTH ? row : k, place = ALONG_DEPTH ? k : row;
    return chunk(line, place / PER_CHUNK)[place % PER_CHUNK];
  }

  // Starts to fill the tile with rows row0... and depths k0..., by all THREADS of the block; zeros
  // outside. Complete after wait_copies and __syncthreads.
  template <int THREADS, typename Global>
  __device__ __forceinline__ void load(const Operand<Global>& from, int row0, int k0) const {
    const int64_t line_stride = ALONG_DEPTH ? from.stride_row : from.stride_depth;
    const int64_t place_stride = ALONG_DEPTH ? from.stride_depth : from.stride_row;
    const bool by_chunks =
        Is<T, Global> && place_stride == 1 && is_aligned(from.data, line_stride, sizeof(T));
    const int line0 = ALONG_DEPTH ? row0 : k0, place0 = ALONG_DEPTH ? k0 : row0;
    const int lines = ALONG_DEPTH ? from.rows : from.depth;
    const int places = ALONG_DEPTH ? from.depth : from.rows;
#pragma unroll
    for (int i = threadIdx.x; i < LINES * CHUNKS; i += THREADS) {
      const int line = i / CHUNKS, index = i % CHUNKS;
      const int place = place0 + index * PER_CHUNK;
      const int left = line0 + line < lines ? min(max(places - place, 0), PER_CHUNK) : 0;
      const Global* source = from.data + (line0 + line) * line_stride + place * place_stride;
      T* to = chunk(line, index);
      if (by_chunks) {
        copy_async(to, left > 0 ? source : from.data, left * static_cast<int>(sizeof(T)));
      } else {
        Chunk<T> values;
#pragma unroll
        for (int e = 0; e < PER_CHUNK; ++e) {
          values.value[e] = e < left ? converted(source[e * place_stride]) : T{};
        }
        *reinterpret_cast<Chunk<T>*>(to) = values;
      }
    }
  }

 private:
  template <typename Global>
  __device__ __forceinline__ static T converted(Global value) {
    if constexpr (Is<T, Global>) {
      return value;
    } else {
      return from_float<T>(to_float(value));
    }
  }
};

}  // namespace secura

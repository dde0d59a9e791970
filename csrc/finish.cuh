// What a tile of base values and a tile of changes become: the last step of three kernels.
#pragma once

#include "fragments.cuh"
#include "gate.cuh"
#include "passes.h"
#include "reduce.cuh"

namespace secura {

// Whether y and what is saved, `columns` wide, can be stored by eights.
template <typename T>
bool by_eights(const T* y, const Finish& finish, int columns) {
  return by_eights(y, columns) &&
         by_eights(static_cast<const GateCode<T>*>(finish.saved), columns);
}

__device__ __forceinline__ float element(const float* vector, int i, float missing) {
  return vector == nullptr ? missing : vector[i];
}

// run(column, j, odd) for each column of a thread's fragments that lies inside.
template <class Accumulator, typename Run>
__device__ __forceinline__ void for_columns(int column0, int columns, Run run) {
#pragma unroll
  for (int j = 0; j < Accumulator::J; ++j) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int column = column0 + Accumulator::column(j, odd);
      if (column < columns) {
        run(column, j, odd);
      }
    }
  }
}

// sum += vector, column by column; nothing where there is none.
template <typename T, class Accumulator>
__device__ __forceinline__ void add_vector(Accumulator& sum, const T* vector, int column0,
                                           int columns) {
  if (vector == nullptr) {
    return;
  }
  for_columns<Accumulator>(column0, columns, [&](int column, int j, int odd) {
    const float value = to_float(vector[column]);
#pragma unroll
    for (int i = 0; i < Accumulator::I; ++i) {
      sum.value[i][j][odd] += value;
      sum.value[i][j][odd + 2] += value;
    }
  });
}

// The bits of the largest relative magnitude of a tile, rows and columns outside left out.
template <class Accumulator>
__device__ __forceinline__ int largest_bits(const Accumulator& base, const Accumulator& change,
                                            float eps, int row0, int rows, int column0,
                                            int columns) {
  int bits = 0;
  for_columns<Accumulator>(column0, columns, [&](int, int j, int odd) {
#pragma unroll
    for (int i = 0; i < Accumulator::I; ++i) {
#pragma unroll
      for (int e = odd; e < 4; e += 2) {
        if (row0 + Accumulator::row(i, e) < rows) {
          bits = max(bits, bits_of(relative_magnitude(base.value[i][j][e],
                                                      change.value[i][j][e], eps)));
        }
      }
    }
  });
  return bits;
}

// S-MagNorm of `base` and `change`, whose decay factors go by the tile's rows (the weight domain)
// or columns; stores the values in y and, where asked for, the gate's code. The count
// of gates <= edge, for `add_count`. EIGHTS: as in `store`, of y and of what is saved.
template <typename T, bool DECAY_BY_ROWS, bool EIGHTS = false, class Accumulator>
__device__ __forceinline__ int finish(Accumulator& base, Accumulator& change, const Finish& finish,
                                      float slope, T* y, int row0, int rows, int column0,
                                      int columns) {
  using Code = GateCode<T>;
  int count = 0;
  for_columns<Accumulator>(column0, columns, [&](int column, int j, int odd) {
    float decay = DECAY_BY_ROWS ? 1.0f : element(finish.decay, column, 1.0f);
#pragma unroll
    for (int i = 0; i < Accumulator::I; ++i) {
#pragma unroll
      for (int e = odd; e < 4; e += 2) {
        const int row = row0 + Accumulator::row(i, e);
        if (DECAY_BY_ROWS && row < rows) {
          decay = element(finish.decay, row, 1.0f);
        }
        float& b = base.value[i][j][e];
        float& d = change.value[i][j][e];
        const GateValue value = gate_value(b, d, slope, finish.gate);
        count += row < rows && value.g <= finish.edge;
        b = apply_gate(b, d, value.s, finish.gate, decay);
        d = encode<Code>(value, finish.gate);
      }
    }
  });
  store<T, EIGHTS>(base, y, row0, rows, column0, columns);
  if (finish.saved != nullptr) {
    store<Code, EIGHTS>(change, static_cast<Code*>(finish.saved), row0, rows, column0, columns);
  }
  return count;
}

}  // namespace secura

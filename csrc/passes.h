// The passes as the host calls them: one parameter struct and one function each.
//
// M tokens, K inputs, N outputs, rank r; padded: r rounded up to a multiple of 16. A "factor" is C or
// R gathered as (long, padded), rows contiguous, zeros beyond r. h and q are (M, padded), rows
// contiguous. Strides are in elements. Pointers marked "or null" turn something off.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace secura {

constexpr int LARGEST_RANK = 256;

enum class Dtype { float32, bfloat16, float16 };

// Element (i, j) of a matrix lies at data[i * stride_row + j * stride_column].
struct Matrix {
  const void* data;
  int64_t stride_row, stride_column;
  int rows, columns;
};

// S-MagNorm's numbers, and what its saved code needs [backends/triton/passes/gate.py in Python]. `on`
// is false for a layer without a gate.
struct Gate {
  bool on;
  float slope, offset, eps, beta, top, code_steps, code_low;
  float by_beta, by_steps;  // 1 / beta, 1 / code_steps
};

// Where a pass runs: the layer's dtype and the current stream of the tensors' device.
struct Launch {
  Dtype dtype;
  cudaStream_t stream;
};

// Fails where the current device cannot run this library: no code for its chip, an old driver.
void probe();

// factor = matrix[:, index], padded with zeros.
struct Gather {
  Matrix matrix;         // (long, at least r)
  const int64_t* index;  // (r,) or null: the first r columns
  int r, padded;
  void* factor;
};
void gather(const Gather&, const Launch&);

// p = a factor (M, r), q = alpha p core^T. With a task gate q is multiplied by the openness of p; or
// in a backward pass, with t, p by that of t, and q is the gradient of t. With `part` a is taken in
// `parts` groups of columns, so that few rows fill the chip too; their products are then added in
// order.
struct Down {
  Matrix a;          // (M, K)
  const void* factor;  // (K, padded)
  int r, padded;
  Matrix core;  // (r, r) float32
  float alpha;
  void* p;         // (M, r), of the layer's dtype or float32
  bool p_float32;  // which
  void* q;         // (M, padded)
  const float* task_gate;  // (r, 2), w and shares of c, or null: see low_rank.cuh
  const void* t;           // (M, r) of the layer's dtype, or null
  float* part;     // (parts, M, r) or null
  int parts;       // 1 where it is null
  bool sum_parts;  // false; true in the second launch, which adds them
};
void down(const Down&, const Launch&);

// p = a[:, index] (M, r), q = alpha p core^T, times the openness of p.
struct Project {
  Matrix a;              // (M, at least r)
  const int64_t* index;  // (r,) or null: the first r columns
  int r, padded;
  Matrix core;  // (r, r) float32
  float alpha;
  void* p;         // (M, r)
  void* q;         // (M, padded), of the layer's dtype or float32
  bool q_float32;  // which
  const float* task_gate;  // as in Down
};
void project(const Project&, const Launch&);

// What turns a base output and a change into a layer's output.
struct Finish {
  const float* adapter_bias;  // (N,) or null
  const float* decay;         // (N,) or null
  Gate gate;
  void* saved;                // (M, N) or null: the gate in its code
  unsigned long long* moved;  // (1,) or null: raised by the count of gates <= edge
  float edge;
};

// y = a b^T + h factor^T + biases, gated.
struct Product {
  Matrix a, b;       // (M, K), (N, K)
  const void* h;     // (M, padded)
  const void* factor;  // (N, padded)
  int padded;
  const void* bias;  // (N,) of the layer's dtype, or null
  Finish finish;
  void* y;  // (M, N)
};
void product(const Product&, const Launch&);

// y, the base output, becomes the layer's; with find_largest it is only read.
struct Epilogue {
  void* y;  // (M, N)
  int M, N;
  const void* h;
  const void* factor;
  int padded;
  Finish finish;
  int* largest;  // (1,) or null: the bits of max(rho), for ref = "max"
  bool find_largest;
};
void epilogue(const Epilogue&, const Launch&);

// Everything the backward pass needs of dY and the saved gate. A program owns ROWS_PER_PROGRAM
// rows, or with v_part one of `parts` groups of their columns.
struct GateBackward {
  Matrix dy;          // (M, N)
  const void* saved;  // (M, N)
  const void* factor;   // C, (N, padded)
  int r, padded;
  const int64_t* rows;  // (r,), or null: R is stored
  Matrix core;          // (r, r) float32, transposed: q = alpha v core
  float alpha;
  const float* decay;  // (N,) or null
  Gate gate;
  void* g;           // (M, N) or null
  float* v;          // (M, r) or null
  void* q;           // (M, padded) or null
  float* bias_part;  // (BIAS_PARTS programs, N) or null
  float* v_part;     // (parts, M, r) or null; with v
  int parts;         // 1 where it is null
  bool sum_parts;    // as in Down
};
constexpr int ROWS_PER_PROGRAM = 64;
constexpr int BIAS_PARTS = 4;
void gate_backward(const GateBackward&, const Launch&);

// part[i] = alpha v^T t over the i-th ROWS_PER_PART rows.
struct CoreGradient {
  Matrix v;  // (M, r) float32
  Matrix t;  // (M, r), of the launch's dtype: the layer's or float32
  float alpha;
  float* part;  // (parts, r, r)
};
constexpr int ROWS_PER_PART = 256;
void core_gradient(const CoreGradient&, const Launch&);

// delta_W = P R with P = alpha C core, and the gate over W and it.
struct WeightChange {
  Matrix weight;     // (N, K)
  const float* P;    // (N, padded)
  const void* factor;  // R, (K, padded)
  int padded;
  const float* decay;  // (N,) or null
  Gate gate;
};

// W_eff; with find_largest only max(rho).
struct EffectiveWeight {
  WeightChange change;
  void* out;                  // (N, K), contiguous
  unsigned long long* moved;  // as in Finish
  float edge;
  int* largest;
  bool find_largest;
};
void effective_weight(const EffectiveWeight&, const Launch&);

// part[group] = x W_eff^T over that group's columns of W, for at most MOST_TOKENS tokens.
struct Decode {
  Matrix x;  // (M, K)
  WeightChange change;
  const int* largest;  // (1,) or null: the bits of max(rho)
  int groups;          // of columns of W
  float* part;         // (groups, M, N)
};
constexpr int MOST_TOKENS = 64;
constexpr int COLUMNS_OF_W = 128;  // a block's tile of W, here and below
void decode(const Decode&, const Launch&);

// q[group] = (dW_eff * gate's part) R over that group's columns of W; dW_eff = dY^T X.
struct WeightCoreGradient {
  Matrix dy, x;  // (M, N), (M, K)
  WeightChange change;
  const int* largest;
  int groups;  // of columns of W
  float* q;    // (groups, N, padded), zeros
};
void weight_core_gradient(const WeightCoreGradient&, const Launch&);

}  // namespace secura

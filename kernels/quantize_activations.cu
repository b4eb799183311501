// Inputs to int8 or E4M3, one scale a token.
#include "activations.cuh"

// grid: (M).
KERNEL_OF(activations::THREADS, 2) quantize_activations(activations::Arguments p) {
  SHARED_MEMORY(shared);
  start_dependents();
  inputs_ready();
  activations::round_token<false>(p, {}, reinterpret_cast<float*>(shared));
}

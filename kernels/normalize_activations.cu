// RMSNorm, and its outputs to int8 or E4M3 as quantize_activations has them, in one pass: the router takes the numbers, the experts the codes.
#include "activations.cuh"

// grid: (M).
KERNEL_OF(activations::THREADS, 2) normalize_activations(activations::Arguments p, activations::Norm norm) {
  SHARED_MEMORY(shared);
  start_dependents();
  inputs_ready();
  activations::round_token<true>(p, norm, reinterpret_cast<float*>(shared));
}

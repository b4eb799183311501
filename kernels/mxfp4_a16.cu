// MXFP4 as gpt-oss is published and bf16 inputs, in which E2M1 values are exact.
#include "mma.cuh"
#include "wgmma.cuh"

PRODUCTS(mxfp4_a16, E2m1, Bf16Inputs)
PRODUCTS_OF_MANY(mxfp4_a16, E2m1, Bf16Inputs, 168)

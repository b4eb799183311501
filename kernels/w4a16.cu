// W4A16: integers of 4 bits with a scale a group of 32, 64, 128, ... columns or a row, and bf16 inputs.
#include "mma.cuh"
#include "wgmma.cuh"

PRODUCTS(w4a16, Int4, Bf16Inputs)
PRODUCTS_OF_MANY(w4a16, Int4, Bf16Inputs, 168)

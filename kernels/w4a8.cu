// W4A8: integers of 4 bits with a scale a group of 32, 64, 128, ... columns or a row, and int8 inputs with a scale a token.
#include "mma.cuh"
#include "wgmma.cuh"

PRODUCTS(w4a8, Int4, Int8Inputs)
PRODUCTS_OF_MANY(w4a8, Int4, Int8Inputs, 128)

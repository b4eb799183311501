// W8A8: integers of 8 bits with a scale a row or group, and int8 inputs with a scale a token.
#include "mma.cuh"
#include "wgmma.cuh"

PRODUCTS(w8a8, Int8, Int8Inputs)
PRODUCTS_OF_MANY(w8a8, Int8, Int8Inputs, 168)

// MXFP4 as gpt-oss is published, without requantization, and int8 inputs with a scale a token: twice an E2M1 value is an exact int8.
#include "mma.cuh"
#include "wgmma.cuh"

PRODUCTS(mxfp4_a8, E2m1, Int8Inputs)
PRODUCTS_OF_MANY(mxfp4_a8, E2m1, Int8Inputs, 128)

"""Similarities of many vectors: joins, clusters and neighbors, in bounded memory, decided exactly.

Vectors are stored in float16. Products of two such numbers, and sums of them for vectors of about unit length, are
exact in float64. So what float32 leaves open, because two similarities are closer than its rounding, is decided in
float64; and no decision depends on the order of rows, the size of tiles, the number of threads or the device.
"""

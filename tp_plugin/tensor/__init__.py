"""The mathematics of tensor parallelism: f and g, sharded layers, the split vocabulary, RNG, gradient norms."""

"""kvbench: what compressing the KV cache buys and costs."""

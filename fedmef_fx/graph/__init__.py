"""Programs of torch.fx graphs, the pipeline that rewrites them, and what is known of their operators."""

"""Files: pipelines in the Diffusers layout, their tensors, the tokenizer, and video."""

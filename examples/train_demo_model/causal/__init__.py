"""A causal few-step mode of the demo model: a LoRA that makes video chunk by chunk, with the stock weights left as they are."""

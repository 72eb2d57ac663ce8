"""`verify --logits`: built-in pictures and prompts through two models, and where they part."""

"""What GGUF says in its own words: names, metadata, mixes of types, tokenizers. `import gguf` means the library."""

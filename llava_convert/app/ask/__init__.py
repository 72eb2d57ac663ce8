"""A model that answers: any layout loaded from its own files, pictures, prompts, and the programs that compute."""

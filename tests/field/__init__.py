"""What people really have in their folders: facts in configs, bases, adapters, and outputs that were changed."""

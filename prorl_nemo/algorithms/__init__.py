"""ProRL v2 as pure functions of tensors. Imports torch and nothing else of this project."""

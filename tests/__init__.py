"""The test suite. The runtime is imported before PyTorch, whose threads it configures."""

import sti_runtime as sti_runtime

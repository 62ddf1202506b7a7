"""One module per family of models, found by name through `registry`.

Each has `preparation`, `identity`, `check`, `uses_gpu`, `load` and LIBRARIES.
"""

"""One module per family of models, each with `preparation`, `check`, `load` and LIBRARIES; `registry` finds them by name."""

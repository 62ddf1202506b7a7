"""onnxruntime sessions whose bits do not depend on the machine's load: one thread, the CPU, one image at a time."""

from typing import Any

from curation.errors import UserError


def open_session(model: str | bytes) -> Any:
    """An InferenceSession of a file or of a model's bytes. Raises UserError (exit code 1) without onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is not installed: `pip install 'lvd-curate[filters]'`", exit_code=1) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Every new input shape would leave an arena behind that grows with the number of shapes seen.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

"""Let vLLM's V2 runner, whose kernels are Triton's, run on a CPU: with Triton's interpreter behind a pretended backend.

For a process that is started with this folder on PYTHONPATH, TRITON_INTERPRET=1 and VLLM_USE_V2_MODEL_RUNNER=1.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class _Backend:
        driver, compiler = _Driver, None

    triton.backends.backends["cpu"] = _Backend  # vLLM asks for one of this name
